"""Displays for notebooks (floor 5).

`%load_ext trio_llm.notebook` makes the messages of a step, the block manager and the scheduler show themselves.
`show_texts(tokenizer.decode)` adds the text of every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any


def load_ipython_extension(ipython: Any) -> None:
    """Teach IPython to show messages and the scheduler as tables, and the block manager as a picture."""
    _register(ipython, None)


def show_texts(decode: Callable[..., str]) -> None:
    """Write the text of each token beside its id in the tables of this notebook.

    Args:
        decode: `Tokenizer.decode` of the model.
    """
    from IPython.core.getipython import get_ipython

    _register(get_ipython(), partial(decode, skip_special_tokens=False))


def _register(ipython: Any, decode: Callable[[Sequence[int]], str] | None) -> None:
    from trio_llm.core.block_manager import BlockManager
    from trio_llm.core.scheduler import Scheduler
    from trio_llm.messages import BlockAsk, BlockGrant, Commit, StepPlan, StepResult
    from trio_llm.notebook import pictures, tables

    html = ipython.display_formatter.formatters["text/html"]
    html.for_type(BlockAsk, partial(tables.ask_table, decode=decode))
    html.for_type(BlockGrant, tables.grant_table)
    html.for_type(StepPlan, partial(tables.plan_table, decode=decode))
    html.for_type(StepResult, partial(tables.result_table, decode=decode))
    html.for_type(Commit, partial(tables.commit_table, decode=decode))
    html.for_type(Scheduler, partial(tables.scheduler_table, decode=decode))
    html.for_type(BlockManager, lambda blocks: pictures.draw_pool(blocks)._repr_html_())
