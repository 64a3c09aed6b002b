"""Answers about files and batches. Times are Unix seconds."""

from __future__ import annotations

from typing import Literal

from trio_llm.server.answers.base import Answer, CachedTokens, ReasoningTokens


class File(Answer, kw_only=True):
    """An uploaded file, or a result of a batch.

    Attributes:
        id: Name of the file in other requests.
        object: Type of the object.
        bytes: Size of the content.
        created_at: When it was uploaded.
        expires_at: When it is deleted; null for never.
        filename: Name that the client gave.
        purpose: What it was uploaded for.
        status: Always "processed".
        status_details: Always null.
    """

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class _Page(Answer, kw_only=True):
    """Part of a list.

    Attributes:
        object: Type of the object.
        data: The entries, in order.
        first_id: Id of the first entry.
        last_id: Id of the last entry; as `after` it asks for the next page.
        has_more: Whether more follow.
    """

    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class Files(_Page, kw_only=True):
    """A page of files."""

    data: list[File]


class Deleted(Answer, kw_only=True):
    """What became of a file.

    Attributes:
        id: Id of the file.
        object: Type of the object.
        deleted: Whether it was there.
    """

    id: str
    object: Literal["file"] = "file"
    deleted: bool


class BatchFault(Answer, kw_only=True):
    """Why an input file is no batch.

    Attributes:
        code: Kind of the fault.
        message: What is wrong.
        line: Number of the line, from 1.
        param: The field that is wrong.
    """

    code: str
    message: str
    line: int | None
    param: str | None


class BatchFaults(Answer, kw_only=True):
    """Why an input file is no batch.

    Attributes:
        object: Type of the object.
        data: The faults that were found.
    """

    object: Literal["list"] = "list"
    data: list[BatchFault]


class LineCounts(Answer, kw_only=True):
    """How many lines there are, and what became of them so far.

    Attributes:
        total: Lines of the input file.
        completed: Lines that were answered.
        failed: Lines that were refused or failed.
    """

    total: int
    completed: int
    failed: int


class BatchUsage(Answer, kw_only=True):
    """Tokens of the answered lines.

    Attributes:
        input_tokens: Tokens of the prompts.
        input_tokens_details: The cached part of them.
        output_tokens: Tokens of the answers.
        output_tokens_details: The part of them that was reasoning.
        total_tokens: The sum of both.
    """

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Batch(Answer, kw_only=True):
    """A batch.

    Attributes:
        id: Name of the batch in other requests.
        object: Type of the object.
        endpoint: Which endpoint answers its lines.
        errors: Why the input file is no batch.
        input_file_id: File of the requests.
        completion_window: Time until it expires.
        status: How far it is.
        output_file_id: File of the answers.
        error_file_id: File of the lines that were refused, failed or expired.
        created_at: When it was made.
        expires_at: When it ends, complete or not.
        in_progress_at: When its input file had been checked.
        finalizing_at: When all lines had been answered.
        completed_at: When its result files were complete.
        failed_at: When its input file was refused.
        expired_at: When it ended because its time was over.
        cancelling_at: When its end was asked for.
        cancelled_at: When it ended for that reason.
        request_counts: What became of its lines.
        usage: Tokens of the answered lines.
        metadata: The client's own pairs of names and values.
    """

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchFaults | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
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
