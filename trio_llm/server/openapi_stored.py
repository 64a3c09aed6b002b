"""What the endpoints of files and batches answer, as types; see openapi_answers."""

from __future__ import annotations

from typing import Literal

from trio_llm.server.openapi_answers import Answer, CachedTokens, ReasoningTokens


class File(Answer, kw_only=True):
    """An uploaded file, or the result of a batch. Times are Unix seconds."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class _Page(Answer, kw_only=True):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Files(_Page, kw_only=True):
    """A page of files."""

    data: list[File]


class Deleted(Answer, kw_only=True):
    """What became of a file."""

    id: str
    object: Literal["file"]
    deleted: bool


class BatchFault(Answer, kw_only=True):
    """Why an input file is no batch."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchFaults(Answer, kw_only=True):
    """All that was found."""

    object: Literal["list"]
    data: list[BatchFault]


class LineCounts(Answer, kw_only=True):
    """How many lines there are, and what became of them so far."""

    total: int
    completed: int
    failed: int


class BatchUsage(Answer, kw_only=True):
    """What the answered lines have cost."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Batch(Answer, kw_only=True):
    """A batch. Times are Unix seconds."""

    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
    errors: BatchFaults | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: LineCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class Batches(_Page, kw_only=True):
    """A page of batches."""

    data: list[Batch]
