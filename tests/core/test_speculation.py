"""What drafts get, what they never take, and what is left of them."""

from __future__ import annotations

import pytest

from tests.core.hash_model import next_token
from tests.core.loop import FULL, SLIDING, VOCAB, Loop, prompt_of
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.prompt_lookup import LookupSizes
from trio_llm.core.speculation import Speculation
from trio_llm.messages import Admit, BlockAsk, BlockGrant, Finished, Tokens
from trio_llm.params import SamplingParams

LONG = SamplingParams(max_tokens=40, ignore_eos=True)


def wrong(token: int) -> int:
    """Guess what the model never says here."""
    return (token + 1) % VOCAB


def admitted(blocks: BlockManager, *lengths: int) -> None:
    """Let sequences 1, 2... of these lengths run; each has computed all but its newest token."""
    admits = tuple(Admit(at, tuple(range(100 * at, 100 * at + length))) for at, length in enumerate(lengths, start=1))
    ids = tuple(admit.request_id for admit in admits)
    blocks.reserve(BlockAsk(1, (), (), admits, (), (), (), (), (), (), ids, 1000, 1000))


def decode(
    blocks: BlockManager,
    rows: tuple[tuple[int, int, int, int], ...],
    *,
    step: int = 2,
    budget: int = 100,
    waiting: tuple[tuple[int, int], ...] = (),
) -> BlockGrant:
    """Ask for a token each; `rows` are (request_id, computed, drafts, room_end), `waiting` (request_id, length)."""
    ids, computed, drafts, rooms = zip(*rows, strict=True)
    ends = tuple(start + 1 for start in computed)
    admits = tuple(Admit(request_id, tuple(range(length))) for request_id, length in waiting)
    others = tuple(request_id for request_id, _ in waiting)
    none = (0,) * len(others)
    news = ((7,),) * len(ids)
    wishes = (drafts + none, rooms + none)
    ask = BlockAsk(step, (), (), admits, ids, computed, computed, ends, news, ids, others, budget, 100, *wishes)
    return blocks.reserve(ask)


def manager(num_blocks: int) -> BlockManager:
    """Return a manager of one group that sees everything, in blocks of four."""
    return BlockManager(num_blocks=num_blocks, groups=FULL, secret=b"key")


def test_drafts_get_what_all_rows_leave_of_the_budget() -> None:
    """Every decode and every waiting prompt comes before the first draft; the drafts are cut in the rows' order."""
    blocks = manager(64)
    admitted(blocks, 4, 4, 4)
    rows = ((1, 4, 3, 8), (2, 4, 3, 8), (3, 4, 3, 8))
    grant = decode(blocks, rows, budget=12, waiting=((9, 5),))
    assert grant.request_ids == (1, 2, 3, 9)
    assert grant.counts == (4, 2, 1, 5)
    assert grant.drafts == (3, 1, 0, 0)


def test_a_row_that_is_not_at_its_end_has_no_drafts() -> None:
    """Where the budget ends a prompt early nothing is sampled, so there is nothing to guess and no room is taken."""
    blocks = manager(64)
    admitted(blocks, 4)
    grant = decode(blocks, ((1, 4, 0, 8),), budget=4, waiting=((9, 9),))
    assert grant.counts == (1, 3)
    assert grant.capacities == (8, 4)
    assert blocks.tables(9) == ((3,),)


def test_slots_beyond_the_end_are_told_with_the_row() -> None:
    """Blocks for drafts follow those for the newest token, in the table and in what the runner is told of it."""
    blocks = manager(64)
    admitted(blocks, 4)
    grant = decode(blocks, ((1, 4, 5, 14),))
    assert grant.new_blocks == (((1, (2, 3, 4)),),)
    assert (grant.counts, grant.drafts, grant.capacities) == ((6,), (5,), (16,))
    assert blocks.tables(1) == ((1, 2, 3, 4),)


@pytest.mark.parametrize(("num_blocks", "waiting"), [(4, ()), (6, ((9, 16),))], ids=["none left", "somebody waits"])
def test_a_draft_costs_nobody_a_block(num_blocks: int, waiting: tuple[tuple[int, int], ...]) -> None:
    """Without spare blocks, or while a sequence waits for some, drafts have the slots that are there anyway."""
    blocks = manager(num_blocks)
    admitted(blocks, 4, 4)
    grant = decode(blocks, ((1, 4, 6, 12),), waiting=waiting)
    assert (grant.counts, grant.drafts, grant.capacities) == ((4,), (3,), (8,))
    assert not grant.preempted


def test_drafts_leave_promised_blocks_alone() -> None:
    """A sequence admitted on part of its prompt was promised blocks for the rest; drafts do not get these."""
    blocks = manager(7)
    admitted(blocks, 4)
    blocks.reserve(BlockAsk(2, (), (), (Admit(9, tuple(range(16))),), (), (), (), (), (), (), (9,), 4, 4))
    grant = decode(blocks, ((1, 4, 6, 12),), step=3)
    assert grant.capacities == (8,)


def test_the_window_is_left_when_slots_are_added_for_drafts() -> None:
    """A long output of a window model owns no more blocks with drafts than its window and the drafts take."""
    loop = Loop(SLIDING, max_model_len=120, speculation=Speculation(4, None), guess=wrong)
    loop.submit(prompt_of(5), SamplingParams(max_tokens=100, ignore_eos=True))
    loop.run()
    assert max(grant.stats.used_blocks[0] for grant in loop.grants) <= 5


def test_right_drafts_are_kept_and_one_token_more() -> None:
    """A draft model that is always right makes steps of its drafts and a token, told in one event each."""
    loop = Loop(speculation=Speculation(3, None), max_model_len=200, num_blocks=100)
    request_id = loop.submit(prompt_of(6), SamplingParams(max_tokens=33, ignore_eos=True))
    loop.run()
    told = [len(event.token_ids) for event in loop.clients[request_id].events if isinstance(event, Tokens)]
    assert told == [1, *[4] * 8]
    assert [stats.drafted for stats in loop.stats] == [(), *[(1, 1, 1)] * 8]
    assert [stats.accepted for stats in loop.stats] == [(), *[(1, 1, 1)] * 8]
    assert sum(stats.num_generated_tokens for stats in loop.stats) == 33
    assert sum(stats.num_prefill_tokens for stats in loop.stats) == 6


def test_wrong_drafts_cost_steps_nothing() -> None:
    """Where no draft is right each step still yields its token, and the statistics say so."""
    loop = Loop(speculation=Speculation(2, None), guess=wrong)
    loop.submit(prompt_of(6), SamplingParams(max_tokens=9, ignore_eos=True))
    loop.run()
    assert len(loop.plans) == 9
    assert [stats.accepted for stats in loop.stats] == [()] * 9
    assert [sum(stats.drafted) for stats in loop.stats] == [0, *[2] * 6, 1, 0]


def test_nothing_is_drafted_beyond_the_last_token() -> None:
    """Drafts end before the output's last token, which is sampled after them; a draft model computes no further."""
    loop = Loop(speculation=Speculation(8, None))
    loop.submit(prompt_of(4), SamplingParams(max_tokens=5, ignore_eos=True))
    loop.run()
    assert [plan.drafts for plan in loop.plans] == [(0,), (3,)]
    assert [plan.draft_limits for plan in loop.plans] == [(7,), (7,)]


def test_an_end_among_the_drafts_ends_the_output_there() -> None:
    """What was guessed and sampled after a stop token is dropped: nobody is told of it, and it is not counted."""
    prompt = prompt_of(6)
    tokens = list(prompt)
    for _ in range(4):
        tokens.append(next_token(tokens, FULL, VOCAB))
    loop = Loop(speculation=Speculation(8, None), eos=())
    stop = tokens[8]
    request_id = loop.submit(prompt, SamplingParams(max_tokens=30, stop_token_ids=(stop,)))
    loop.run()
    client = loop.clients[request_id]
    assert client.output == tokens[6:9]
    last = client.events[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.stop_token_id, last.usage.completion_tokens) == ("stop", stop, 3)


def test_what_was_kept_can_be_hit_and_what_was_not_cannot() -> None:
    """A prompt that repeats an output hits its blocks up to the kept tokens, whatever was guessed after them."""
    loop = Loop(speculation=Speculation(3, None), guess=lambda token: token if token % 3 else wrong(token))
    first = loop.submit(prompt_of(6), SamplingParams(max_tokens=20, ignore_eos=True))
    loop.run()
    again = loop.submit((*prompt_of(6), *loop.clients[first].output), SamplingParams(max_tokens=8, ignore_eos=True))
    loop.run()
    assert loop.clients[again].hit in (20, 24)


def test_a_sequence_rests_until_its_drafts_are_judged() -> None:
    """While its row is in flight it has none in the next step, which another sequence may have to itself."""
    loop = Loop(speculation=Speculation(2, LookupSizes(1, 2)), depth=2)
    first = loop.submit(prompt_of(4) * 3, LONG)
    assert loop.step() is not None
    assert loop.scheduler.ask() is None
    second = loop.submit(prompt_of(5, seed=2) * 2, LONG)
    assert loop.step() is not None
    assert [plan.request_ids for plan in loop.plans] == [(first,), (second,)]
    loop.run()
    assert any(max(plan.drafts) == 2 for plan in loop.plans)


def test_a_sequence_that_starts_over_has_no_drafts() -> None:
    """Its prompt and output are computed again first; what was guessed before would make rows longer than allowed."""
    loop = Loop(speculation=Speculation(2, None))
    loop.submit(prompt_of(4), LONG)
    loop.step()
    (sequence,) = loop.scheduler.running
    assert sequence.drafts
    assert not sequence.restart().drafts


def test_blocks_of_the_preempted_are_not_for_drafts() -> None:
    """Where sequences lose their blocks in a step, what is left of these waits for them to come back."""
    blocks = manager(4)
    admitted(blocks, 4, 4, 4)
    grant = decode(blocks, ((1, 4, 6, 12), (2, 4, 6, 12), (3, 4, 6, 12)))
    assert grant.preempted == (3, 2)
    assert grant.capacities == (8,)


def test_a_row_with_drafts_is_no_longer_than_any_other() -> None:
    """The limit on the tokens of one sequence in a step counts drafts, too."""
    loop = Loop(threshold=3, speculation=Speculation(8, None))
    loop.submit(prompt_of(4), LONG)
    loop.run()
    assert max(max(plan.counts) for plan in loop.plans) == 3
    assert any(sum(plan.drafts) == 2 for plan in loop.plans)
