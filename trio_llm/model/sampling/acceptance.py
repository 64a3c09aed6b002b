"""Accept or reject drafts: which of the tokens sampled after them become output.

The sampler's noise is a function of (seed, position, token), so the token at a position depends on the logits there and
on nothing that was drawn before. The logits after a draft are valid if the draft equals the token sampled at its
position. So sampled tokens are accepted up to and including the first that differs from its draft: the output is, token
for token, the output without drafts, for greedy and for random rows alike. This is stronger than rejection sampling
(Leviathan et al. 2023, arXiv:2211.17192), which only keeps the distribution; and as a draft model draws with the same
noise, its drafts agree about as often as rejection sampling would accept them.
"""

from __future__ import annotations

from collections.abc import Sequence


def accepted_tokens(sampled: Sequence[int], drafts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the accepted tokens, at least one per row; a negative one is a failure, and the only one of its row.

    Args:
        sampled: Row after row: the token after the last known one, then one after each draft.
        drafts: Per row.
    """
    accepted: list[list[int]] = []
    at = 0
    for draft in drafts:
        own = list(sampled[at : at + len(draft) + 1])
        at += len(own)
        right = 0
        while right < len(draft) and own[right] == draft[right]:
            right += 1
        # A failure after accepted drafts is left to the next step, which begins there.
        accepted.append(own[:right] if right and own[right] < 0 else own[: right + 1])
    assert at == len(sampled)
    return accepted
