"""Which of the tokens that were sampled after drafts count.

The sampler's noise is a function of (seed, position, token), so the token at a position depends on the logits there and
on nothing that was drawn before. The logits after a draft are right if the draft is what was sampled in its place.
So what is sampled counts up to the first token that is not the draft's, that one included: the output is, token for
token, what it would be without drafts, for greedy and for random rows alike. This is stronger than rejection sampling
(Leviathan et al. 2023, arXiv:2211.17192), which only keeps the distribution; and as a draft model draws with the same
noise, its drafts agree about as often as rejection sampling would accept them.
"""

from __future__ import annotations

from collections.abc import Sequence


def kept_tokens(sampled: Sequence[int], drafts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the tokens that count, at least one per row; a negative one, a failure, stands alone.

    Args:
        sampled: Row after row, one token after the last known one and one after each draft.
        drafts: Per row.
    """
    kept: list[list[int]] = []
    at = 0
    for draft in drafts:
        own = list(sampled[at : at + len(draft) + 1])
        at += len(own)
        right = 0
        while right < len(draft) and own[right] == draft[right]:
            right += 1
        # What failed after drafts that are right is found out by the next step, which begins there.
        kept.append(own[:right] if right and own[right] < 0 else own[: right + 1])
    assert at == len(sampled)
    return kept
