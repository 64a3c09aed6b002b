"""Displays for notebooks, and the bridge that holds a live engine across cells (floor 5).

`%load_ext trio_llm.notebook` makes the messages of a step, the block manager and the scheduler show themselves.
"""

from __future__ import annotations

from typing import Any


def load_ipython_extension(ipython: Any) -> None:
    """Teach IPython to show messages as tables and the block manager as a picture."""
    from trio_llm.core.block_manager import BlockManager
    from trio_llm.messages import BlockAsk, BlockGrant, Commit, StepPlan, StepResult
    from trio_llm.notebook import pictures, tables

    html = ipython.display_formatter.formatters["text/html"]
    html.for_type(BlockAsk, tables.ask_table)
    html.for_type(BlockGrant, tables.grant_table)
    html.for_type(StepPlan, tables.plan_table)
    html.for_type(StepResult, tables.result_table)
    html.for_type(Commit, tables.commit_table)
    html.for_type(BlockManager, lambda blocks: pictures.draw_pool(blocks)._repr_html_())
