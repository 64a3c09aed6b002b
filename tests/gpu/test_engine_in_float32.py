"""The tests of the runner and of the engine, on a GPU in float32.

No kernel takes float32: torch's own operations run there, launched one by one. So these tests are of all but the
kernels and the graphs: copies, streams, tokens that stay on the device, sampling, the pool. Greedy tokens have to equal
transformers' on a CPU.
"""

from __future__ import annotations

import pytest

# ruff: noqa: F401 - tests are collected where they are imported, with the fixtures of this folder
from tests.model_runner.test_embeddings import (
    test_a_preempted_embedding_is_computed_again,
    test_embeddings_come_while_others_generate,
)
from tests.model_runner.test_golden_engine import (
    test_greedy_tokens_are_those_of_transformers,
    test_preemption_changes_no_token,
)
from tests.model_runner.test_int8_kv import (
    test_a_full_pool_corrupts_nothing,
    test_the_prefix_cache_changes_no_stored_byte,
)
from tests.model_runner.test_launch import (
    plans,
    test_a_plan_need_not_know_what_the_step_before_sampled,
    test_a_row_that_failed_harms_nobody_in_the_step_after,
    test_halves_of_a_step_find_the_same_tokens,
)
from tests.model_runner.test_runner import (
    expected,
    runner,
    test_a_poisonous_prompt_fails_alone,
    test_a_preempted_sequence_goes_on_as_if_nothing_had_happened,
    test_a_seed_gives_the_same_tokens_in_any_company,
    test_a_step_may_be_run_again,
    test_int8_keys_and_values_move_logprobs_little,
    test_logprobs_are_those_of_transformers,
    test_steps_tell_what_experts_were_given,
    varied,
)
from tests.model_runner.test_speculation import (
    test_a_prefix_hit_is_one_for_the_draft_model_too,
    test_every_family_says_the_same,
    test_every_parameter_goes_with_drafts,
    test_int8_keys_and_values_go_with_drafts,
)

pytestmark = pytest.mark.gpu
