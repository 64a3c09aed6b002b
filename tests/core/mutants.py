"""Faults seeded into the core, each of which the tests must notice.

`python -m tests.core.mutants` applies one mutant after the other to a copy of the source, runs tests/core/quick.py on
it and prints those that survive; a survivor is a hole in the tests. `python -m tests.core.mutants NAME...` runs some.
A mutant is (name, file, text that occurs once, replacement).
"""

# ruff: noqa: E501, T201  (a mutant a line reads as a table; this is a script)

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 40  # An endless loop counts as noticed.

MUTANTS: tuple[tuple[str, str, str, str], ...] = (
    ("keep the blocks of the ended", "block_manager", "        self._release_all(sequence)\n\n    def _note", "\n    def _note"),
    ("keep the blocks of the preempted", "block_manager", "            self._release_all(self._sequences[victim])\n", ""),
    ("preempt the head", "block_manager", "victims.pop()", "victims.pop(0)"),
    ("admit although preempted", "block_manager", "if not rows.preempted:", "if True:"),
    ("overtake the one without blocks", "block_manager", "                return\n\n    def _admit", "                continue\n\n    def _admit"),
    ("admit on the first chunk", "block_manager", "self._needs(sequence.admit_tokens, start, hits)", "self._needs(min(sequence.num_tokens, start + max_row_tokens), start, hits)"),
    ("forget what was promised", "block_manager", "available = self._pool.num_free - self._reserved_blocks", "available = self._pool.num_free"),
    ("drafts take promised blocks", "block_manager", "<= self._pool.num_free - self._reserved_blocks:", "<= self._pool.num_free:"),
    ("drafts while somebody waits", "block_manager", " and rows.num_admitted == len(ask.waiting)", ""),
    ("drafts although preempted", "block_manager", "has_spare = not rows.preempted and", "has_spare ="),
    ("drafts beyond the budget", "block_manager", "min(num_drafts, rows.budget, sequence.capacity - end)", "min(num_drafts, sequence.capacity - end)"),
    ("drafts beyond the slots", "block_manager", "min(num_drafts, rows.budget, sequence.capacity - end)", "min(num_drafts, rows.budget)"),
    ("room in the middle of a prompt", "block_manager", "            if end == sequence.num_tokens:\n", "            if True:\n"),
    ("drafts keep the window", "block_manager", "                    self._leave_windows(sequence, computed.get(request_id, start))\n", ""),
    ("drafts leave the window early", "block_manager", "computed.get(request_id, start)", "end"),
    ("forget the blocks given before", "sequence_blocks", "(first, blocks + more)", "(first, more)"),
    ("drafts are free", "sequence_blocks", "        self.budget -= num_drafts\n", ""),
    ("count wrong drafts as computed", "speculation", "step.ends[at] + num_kept - 1", "step.ends[at] + step.grant.drafts[at]"),
    ("compute the kept ones again", "speculation", "sequence.computed = sequence.scheduled = step.ends[at] + num_kept - 1", "sequence.computed = sequence.scheduled = step.ends[at]"),
    ("draft the last token", "speculation", "sequence.stop.max_len - 1 - len(sequence.tokens)", "sequence.stop.max_len - len(sequence.tokens)"),
    ("reach too far", "speculation", "row.stop.max_len - 2) if samples", "row.stop.max_len - 1) if samples"),
    ("no room for a draft model", "speculation", "ahead = self.max_drafts if self.lookup is None else 0", "ahead = 0"),
    ("drafts longer than a row", "speculation", "min(self.max_drafts, max_drafts, max_row_tokens - 1)", "min(self.max_drafts, max_drafts)"),
    ("keep what comes after the end", "sequence", "                return newest[:at]\n", "                return newest\n"),
    ("drafts survive a preemption", "sequence", "            drafts=(),\n", ""),
    ("go on before the drafts are judged", "running_step", "if sampled and not grant.drafts and", "if sampled and"),
    ("feed other drafts", "running_step", "sequence.drafts[: grant.drafts[at]]", "sequence.drafts[1 : grant.drafts[at] + 1]"),
    ("find the end itself", "prompt_lookup", "min(last - 1, self._indexed + TOKENS_PER_CALL)", "min(last, self._indexed + TOKENS_PER_CALL)"),
    ("look the shortest up first", "prompt_lookup", "range(min(self._sizes.longest, last), self._sizes.shortest - 1, -1)", "range(self._sizes.shortest, min(self._sizes.longest, last) + 1)"),
    ("lose what crosses a call", "prompt_lookup", "max(0, self._indexed + 1 - size)", "self._indexed"),
    ("copy what came first", "prompt_lookup", "tokens[follows + i % period]", "tokens[i % period]"),
    ("never give a promise back", "block_manager", "        self._reserved_blocks -= sequence.reserved\n", ""),
    ("never use a promise up", "block_manager", "if sequence.reserved or sequence.capacity < sequence.admit_tokens:", "if not sequence.reserved:"),
    ("promise the whole table", "block_manager", "            if new and group.window is not None:\n", "            if False:\n"),
    ("promise shared blocks", "block_manager", "self._pool.references(block) == 1 for", "self._pool.references(block) > 0 for"),
    ("idle hits cost nothing", "block_manager", "new + idle)", "new)"),
    ("count hits as new", "block_manager", "blocks_for(num_tokens, group) - start // group.block_size", "blocks_for(num_tokens, group)"),
    ("hit the last token too", "block_manager", "sequence.num_tokens - 1, find", "sequence.num_tokens, find"),
    ("share what is only scheduled", "block_manager", "computed // size):", "-(-computed // size)):"),
    ("share failures", "block_manager", "        if computed < 0:\n            self._forget(sequence)\n        elif", "        if"),
    ("offer each block once too rarely", "block_manager", "sequence.register_at = sequence.registered + self._chunk_tokens", "sequence.register_at = sequence.registered + 2 * self._chunk_tokens + 1"),
    ("do not offer the last block", "block_manager", "        elif computed >= sequence.register_at:\n            self._register(sequence, computed)\n        self._release", "        self._release"),
    ("read the cache against orders", "block_manager", "if chain is None or not sequence.read_cache:", "if chain is None:"),
    ("cache although switched off", "block_manager", "if self._caching else None", "if True else None"),
    ("drop the salt", "block_manager", "admit.salt, admit.token_ids", 'b"", admit.token_ids'),
    ("lose sampled tokens", "block_manager", "sequence.chain.tail += new", "sequence.chain.tail += new[1:]"),
    ("miscount tokens", "block_manager", "sequence.num_tokens += len(new)", "pass"),
    ("never leave the window", "block_manager", "            if visible > live_from:", "            if False:"),
    ("leave the window twice", "block_manager", "                sequence.live_from[index] = visible\n", ""),
    ("grow one table only", "block_manager", "max(0, blocks_for(end, group) - at), index)", "max(0, blocks_for(end, group) - at) if index == 0 else 0, index)"),
    ("head first", "sequence_blocks", "held.sort(key=itemgetter(0), reverse=True)", "held.sort(key=itemgetter(0))"),
    ("capacity of the largest table", "block_manager", "sequence.capacity = min(", "sequence.capacity = max("),
    ("ignore the budget of admissions", "block_manager", "max_row_tokens, rows.budget)", "max_row_tokens)"),
    ("ignore the budget of rows", "block_manager", "count = min(end - start, rows.budget)", "count = end - start"),
    ("ignore the threshold", "block_manager", "start, max_row_tokens, rows.budget)", "start, rows.budget)"),
    ("count every admission", "block_manager", "if not sequence.was_admitted and", "if"),
    ("look up the refused again", "block_manager", "            sequence.needs = needs\n", ""),
    ("refuse what fits by now", "block_manager", "        self._note_gains()\n        if not rows", "        if not rows"),
    ("look up at every gain", "sequence_blocks", "max(0, sequence.needs - gained)", "0"),
    ("forget who was refused", "block_manager", "            self._any_refused = True\n", ""),
    ("miss what is revived", "block_pool", "            self.cached_blocks -= 1\n            self.num_gained += 1\n", "            self.cached_blocks -= 1\n"),
    ("serve all beyond the budget", "block_manager", "if sum(counts) > rows.budget or 0 in counts:", "if 0 in counts:"),
    ("serve those that rest", "block_manager", " or 0 in counts:", ":"),
    ("serve all beyond the free blocks", "block_manager", "for _, sequence, end in growing]) > self._pool.num_free:", "for _, sequence, end in growing]) < 0:"),
    ("serve all and keep their windows", "block_manager", "            self._leave_windows(sequence, ask.computed[at])\n", ""),
    ("serve all and forget who is short", "block_manager", "                short.append(at)\n", "                pass\n"),
    ("serve all for free", "sequence_blocks", "        self.budget -= sum(counts)\n", ""),
    ("keep the victim's row", "sequence_blocks", "if request_id in self.request_ids:", "if False:"),
    ("keep the victim's tokens", "sequence_blocks", "            self.budget += self.counts[at]\n", ""),
    ("free the preempted twice", "sequence_blocks", "        self.tables = [[] for _ in self.tables]\n", ""),
    ("window off by one, short", "block_math", "position - group.window + 1", "position - group.window + 2"),
    ("window off by one, long", "block_math", "position - group.window + 1", "position - group.window"),
    ("bound without the partial block", "block_math", "max_step_tokens, group) + 1)", "max_step_tokens, group))"),
    ("bound without the chunk", "block_math", "group.window - 1 + max_step_tokens", "group.window"),
    ("longest sequence too long", "block_math", "<= num_blocks:", "<= num_blocks + 1:"),
    ("key without the parent", "prefix", 'content = parent + array("I"', 'content = b"" + array("I"'),
    ("key without the secret", "prefix", "self._hash = blake2b(key=secret, ", "self._hash = blake2b("),
    ("key of the wrong half of a block", "prefix", "return self._digests[end - 1]", "return self._digests[end - ratio]"),
    ("hit between two blocks", "prefix", "step = max(group", "step = min(group"),
    ("no fixed point", "prefix", "while length != agreed:", "if length != agreed:"),
    ("window hit without its first block", "prefix", "while first_cached > first_visible_block(group, length):", "while first_cached > first_visible_block(group, length) + 1:"),
    ("stop at the first hole", "prefix", "            length = (first_cached - 1) * size // step * step\n", "            length = 0\n"),
    ("full hit past a hole", "prefix", "            return at * group.block_size\n", "            return (at + 1) * group.block_size\n"),
    ("trust the digest", "block_pool", "if block and self._content[block] == content", "if block"),
    ("keep the key of a block that is handed out", "block_pool", "                self.forget(block)\n", ""),
    ("evict the newest", "block_pool", "self._free.popitem(last=False)", "self._free.popitem()"),
    ("useless blocks last", "block_pool", "                    self._free.move_to_end(block, last=False)\n", "                    pass\n"),
    ("hit a free block and leave it free", "block_pool", "            del self._free[block]\n", ""),
    ("free a block that others use", "block_pool", "            if self._references[block] == 0:\n                self.used", "            if True:\n                self.used"),
    ("hand out the null block", "block_pool", "range(1, num_blocks)", "range(num_blocks)"),
    ("two blocks under one key", "block_pool", "if digest not in cached:", "if True:"),
    ("followers never freed", "queues", "        self.free_followers(sequence)\n", ""),
    ("followers not held", "queues", "if ahead is not None and not ahead.prompt_computed:", "if False:"),
    ("revive the dead follower", "queues", "            if follower.status is Status.HELD:\n", "            if True:\n"),
    ("preempted to the tail", "sequence", "0 if self.num_preemptions else 1", "1 if self.num_preemptions else 0"),
    ("stop before min_tokens", "sequence", "if newest in self.stop_ids and num_tokens >= self.min_len:", "if newest in self.stop_ids:"),
    ("one token too many", "sequence", 'return "length" if num_tokens >= self.max_len', 'return "length" if num_tokens > self.max_len'),
    ("ignore_eos ignored", "sequence", "eos = () if params.ignore_eos else eos", "eos = eos"),
    ("context end ignored", "sequence", "max_len = min(max_len, num_prompt_tokens + params.max_tokens)", "max_len = num_prompt_tokens + params.max_tokens"),
    ("embed from the cache", "sequence", "return not self.pooling and not self.wants_prompt_logprobs", "return not self.wants_prompt_logprobs"),
    ("score from the cache", "sequence", "return not self.pooling and not self.wants_prompt_logprobs", "return not self.pooling"),
    ("prefills first", "scheduler", "rows = decodes + prefills", "rows = prefills + decodes"),
    ("one sequence too many", "scheduler", "self._max_batch_size - len(running)", "self._max_batch_size + 1 - len(running)"),
    ("no chunks", "scheduler", "min(sequence.target, sequence.scheduled + max_row_tokens)", "sequence.target"),
    ("send tokens again", "scheduler", "            sequence.unsent = ()\n", "            pass\n"),
    ("release twice", "scheduler", "released, self._to_release = self._to_release, []", "released = self._to_release"),
    ("introduce twice", "scheduler", "            sequence.known_to_blocks = True\n", "            pass\n"),
    ("resume with the old progress", "sequence", "            computed=0,\n", ""),
    ("resume with old logprobs", "sequence", "            prompt_logprobs=[],\n", ""),
    ("resume without the output", "scheduler", "tuple(sequence.tokens) if len(sequence.tokens) > len(sequence.prompt) else sequence.prompt", "sequence.prompt"),
    ("preempted stay on the runner", "scheduler", "        self._drop_from_runner(sequence)\n        self._queues.preempt(sequence)\n", "        self._queues.preempt(sequence)\n"),
    ("cached tokens of the resumption", "scheduler", "if sequence.cached_tokens is None:", "if True:"),
    ("run the aborted", "scheduler", "        grant = without_ended(grant, rows)\n", ""),
    ("a failure spreads", "scheduler", "            if why is not None:\n", "            if why is not None or result.failed:\n"),
    ("tell of the aborted", "scheduler", "if not samples or sequence.status is not running:", "if not samples:"),
    ("hide the failure of the aborted", "scheduler", "                sequence.failed = True  # Also", "                sequence.failed = sequence.status is Status.RUNNING  # Also"),
    ("score the prompt twice", "scheduler", "        if sequence.prompt_computed:  # Preempted", "        if False:  # Preempted"),
    ("secondary end unnamed", "scheduler", 'token_id if reason == "stop" and token_id != stop.primary_eos else None', "None"),
    ("accept a prompt that fills the context", "scheduler", "generates=isinstance(params, SamplingParams)", "generates=False"),
    ("tickets lost", "scheduler", "        self._ended += self._asked.released\n", ""),
    ("results in the wrong order", "scheduler", "self._in_flight.popleft()", "self._in_flight.pop()"),
    ("a third step in flight", "step_order", "num_in_flight > 1", "num_in_flight > 2"),
    ("ask for those that rest only", "scheduler", "if not (rows or candidates or self._to_release):", "if not (running or self._queues.waiting or self._to_release):"),
    ("keep what is to be released", "scheduler", "if not (rows or candidates or self._to_release):", "if not (rows or candidates):"),
    ("tell nothing of those that rest", "scheduler", "            rows += [sequence for sequence in running if sequence.target == sequence.scheduled]\n", "            pass\n"),
    ("share what is in flight", "scheduler", "tuple([sequence.computed for sequence in rows])", "tuple([sequence.scheduled for sequence in rows])"),
    ("plan a step in flight again", "scheduler", "tuple([sequence.scheduled for sequence in rows])", "tuple([sequence.computed for sequence in rows])"),
    ("tell the newest token only", "scheduler", "sequence.unsent += sampled", "sequence.unsent = sampled"),
    ("started although preempted", "scheduler", "            if sequence.status is Status.RUNNING:\n                sequence.announced", "            if True:\n                sequence.announced"),
    ("started twice", "scheduler", "                sequence.announced = True\n", ""),
    ("never started if preempted at once", "scheduler", "if not sequence.announced:", "if not sequence.num_preemptions:"),
    ("share tokens nobody told of", "sequence", "min(self.computed, len(self.tokens) - len(self.unsent))", "self.computed"),
    ("results of a former life", "sequence", "        self.status = Status.ENDED\n        return", "        return"),
    ("resume where it was scheduled", "sequence", "            scheduled=0,\n", ""),
    ("resume with the lost token", "sequence", "            target=len(self.tokens),\n", ""),
    ("a token after the vector", "sequence", "return cls(num_prompt_tokens)", "return cls(max_model_len)"),
    ("a row after the last token", "running_step", "sequence.stop.max_len - 1:", "sequence.stop.max_len:"),
    ("no row before the last token", "running_step", "sequence.stop.max_len - 1:", "sequence.stop.max_len - 2:"),
    ("guess the unknown token", "running_step", "if start < len(tokens) else UNKNOWN", "if start < len(tokens) else tokens[-1]"),
    ("know no token", "running_step", "tokens[start] if start < len(tokens) else UNKNOWN", "UNKNOWN"),
    ("grant rows to those that rest", "block_manager", "if start == end or (", "if ("),
    ("leave the window before the commit", "block_manager", "self._leave_windows(sequence, computed)", "self._leave_windows(sequence, start)"),
    ("come back to be preempted", "sequence_blocks", "max(self.num_tokens, self.readmit_tokens)", "self.num_tokens"),
    ("offer blocks that are gone", "sequence_blocks", "        self.register_at = NEVER\n", ""),
    ("priorities ignored", "scheduler", "submission.priority if self._by_priority else 0", "0"),
    ("sample in the middle", "running_step", "samples.append(sampled)", "samples.append(True)"),
    ("a decode of the first token", "running_step", "tokens[start] if", "tokens[0] if"),
    ("plan the same tokens again", "running_step", "            sequence.scheduled = end\n", ""),
    ("show the held text", "stop", "emitted = len(buffer) - max(self._states, default=0)", "emitted = len(buffer)"),
    ("restart naively", "stop", "!= character:\n                    state = failure[state - 1]", "!= character:\n                    state = 0"),
    ("show half characters", "detokenizer", "        if text.endswith(INVALID):\n            return self._flush()", "        if False:\n            return self._flush()"),
    ("a window without end", "detokenizer", "joined and len(self._context) + len(self._pending) <= MAX_CONTEXT_TOKENS", "joined"),
    ("hold for ever", "detokenizer", "self._flush() if len(self._pending) >= MAX_PENDING_TOKENS else", '"" if True else'),
    ("forget what was held", "detokenizer", "if self._pending else \"\"\n        self._pending = []", "if False else \"\"\n        self._pending = []"),
)  # fmt: skip


def survives(name: str, file: str, old: str, new: str) -> bool:
    """Return whether the quick tests pass although the core is broken in this way."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        shutil.copytree(ROOT / "trio_llm" / "core", tree / "trio_llm" / "core", ignore=shutil.ignore_patterns("__pyc*"))
        for module in (ROOT / "trio_llm").glob("*.py"):
            shutil.copy(module, tree / "trio_llm" / module.name)
        shutil.copytree(ROOT / "tests" / "core", tree / "tests" / "core", ignore=shutil.ignore_patterns("__pyc*"))
        path = tree / "trio_llm" / "core" / f"{file}.py"
        source = path.read_text()
        assert source.count(old) == 1, f"{name}: the text occurs {source.count(old)} times in {file}.py"
        path.write_text(source.replace(old, new))
        command = [sys.executable, "-B", "-m", "tests.core.quick"]
        environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            run = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return run.returncode == 0


def main(names: list[str]) -> int:
    """Run all mutants, or those named; return the number of survivors."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant[0] in names]
    survivors = 0
    for number, mutant in enumerate(chosen, start=1):
        survived = survives(*mutant)
        survivors += survived
        print(f"{number:3} {'SURVIVED' if survived else 'noticed '} {mutant[0]}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants noticed")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
