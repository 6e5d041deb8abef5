"""A million stored trajectories: choose, remove duplicates, pack into updates; seconds, rows a second, memory.

    python bench/data_stream.py [--rows 1000000] [--folder DIR] [--samples 8] [--batch 128] [--max-tokens 8192]

Rows are synthetic and judged: `--samples` a prompt, 40 to 200 tokens, a third accepted, a third of the texts repeated.
They are written to DIR (a temporary folder otherwise) and removed afterwards. Each phase is a process of its own; its
memory is the private part (RssAnon, sampled every 20 ms) above what it was before the phase's work. Results are checked
on the way: as many rows as were kept, every kept row in exactly one microbatch.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.files import sha256_of
from tutelage.data.pack import microbatches
from tutelage.data.rows import SCHEMA, encode, to_row
from tutelage.data.select import SelectionRules, select
from tutelage.data.store import Manifest, Shard, TrajectoryStore
from tutelage.data.token_file import TokenFile, rows_of_store, write_token_file
from tutelage.signals.base import LazyRows
from tutelage.train.trainer import Place, Trainer, TrainerSettings
from tutelage.types import Span, Status, Trajectory, Verdict

Result = TypeVar("Result")
PHASES = ("write", "select", "tokens", "pack", "hold")
DISTINCT = 2_000
"""Different token sequences; hashes, verdicts and prompts differ row by row."""


def private_bytes() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watch:
    """Peak private memory above the start, while the block runs."""

    def __enter__(self) -> "Watch":
        self.start = self.peak = private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, private_bytes())

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, private_bytes())

    @property
    def extra(self) -> int:
        return self.peak - self.start


def one(i: int, rng: np.random.Generator) -> Trajectory:
    prompt, answer = rng.integers(20, 60), rng.integers(20, 140)
    ids = rng.integers(5, 49_000, prompt + answer).tolist()
    logprobs = tuple((-rng.exponential(1.0, answer)).tolist())
    spans = (
        Span(token_ids=tuple(ids[:prompt]), role="user", author="user"),
        Span(
            token_ids=tuple(ids[prompt:]),
            role="assistant",
            author="student",
            is_sampled=True,
            is_trainable=True,
            logprobs=logprobs,
            policy_version="v",
        ),
    )
    text = " ".join(map(str, ids[prompt:]))
    messages = ({"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": text})
    verdict = Verdict(status=Status.ACCEPT, verifier="v", reason="r", score=1.0)
    return Trajectory(
        id=f"t{i}", task_id="q", task_hash="h", spans=spans, messages=messages, completion=text, verdict=verdict
    )


def write(folder: Path, rows: int, samples: int, seed: int = 0) -> int:
    """A store of synthetic rows; tokens and text come from `DISTINCT` patterns. Returns its bytes."""
    rng = np.random.default_rng(seed)
    patterns = pa.Table.from_batches([encode(to_row(one(i, rng))) for i in range(DISTINCT)]).combine_chunks()
    folder.mkdir(parents=True)
    manifest, done = Manifest(), 0
    while done < rows:
        count = min(50_000, rows - done)
        path = folder / f"shard-{len(manifest.shards):06d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for start in range(done, done + count, 2_000):
                writer.write_table(_table(patterns, start, min(2_000, done + count - start), samples, rng))
        manifest.shards.append(Shard(name=path.name, rows=count, bytes=path.stat().st_size, sha256=sha256_of(path)))
        done += count
    manifest.save(folder)
    return sum(s.bytes for s in manifest.shards)


def _table(patterns: pa.Table, start: int, count: int, samples: int, rng: np.random.Generator) -> pa.Table:
    table = patterns.take(pa.array(rng.integers(0, DISTINCT, count)))
    prompt = (start + np.arange(count)) // samples
    text = np.where(rng.random(count) < 1 / 3, rng.integers(0, 3, count), 3 + np.arange(count))
    kinds = np.array(["accept", "reject", "error"])[rng.choice(3, count, p=[0.34, 0.65, 0.01])]
    new = {
        "id": [f"t{start + i}" for i in range(count)],
        "task_hash": [f"q{p:012d}" for p in prompt],
        "text_hash": [f"q{p}-{t}" for p, t in zip(prompt, text, strict=True)],
        "prompt_index": prompt,
        "sample_index": (start + np.arange(count)) % samples,
        "verdict_status": kinds,
    }
    for name, values in new.items():
        at = SCHEMA.get_field_index(name)
        table = table.set_column(at, SCHEMA.field(at), pa.array(values, SCHEMA.field(at).type))
    return table


def timed(name: str, rows: int, work: Callable[[], Result], out: list[dict[str, Any]]) -> Result:
    with Watch() as watch:
        result = work()
    out.append(
        {
            "phase": name,
            "rows": rows,
            "seconds": round(watch.seconds, 2),
            "cpu_seconds": round(watch.cpu, 2),
            "rows_per_cpu_second": round(rows / max(watch.cpu, 1e-9)),
            "peak_MB": round(watch.extra / 2**20, 1),
            "bytes_per_row": round(watch.extra / rows),
        }
    )
    print(json.dumps(out[-1]), flush=True)
    return result


def pack(rows: LazyRows, settings: TrainerSettings, max_tokens: int) -> dict[str, float]:
    """One epoch of updates: order, rows by number, microbatches. Counts what a step would run."""
    place = Place(seed=0, stage=0, round=0, num_rounds=1)
    batches = Trainer.batches(None, rows, settings, place)  # type: ignore[arg-type]
    seen = np.zeros(len(rows), dtype=bool)
    tokens = groups = 0
    for batch in batches:
        assert not seen[batch].any()
        seen[batch] = True
        parts = microbatches([rows[i] for i in batch], max_tokens=max_tokens)
        assert sum(map(len, parts)) == len(batch)
        groups += len(parts)
        tokens += sum(r.trajectory.num_tokens for p in parts for r in p)
    assert seen.all()
    return {"updates": len(batches), "microbatches": groups, "real": tokens / (groups * max_tokens)}


def run_phase(name: str, args: argparse.Namespace) -> None:
    """One phase, in a process of its own: what an earlier phase freed and the allocator kept would hide memory."""
    at, out = args.at, []
    if name == "write":
        size = timed(
            "write the store (not part of the job)", args.rows, lambda: write(at / "s", args.rows, args.samples), out
        )
        print(json.dumps({"store_GB": round(size / 1e9, 3)}))
    elif name == "select":
        rules = SelectionRules(is_whole=True, distinct="text", max_per_prompt=4, order="shortest")
        chosen = timed("select and remove duplicates", args.rows, lambda: select(TrajectoryStore(at / "s"), rules), out)
        np.save(at / "kept.npy", chosen.is_kept)
        print(json.dumps({"kept": chosen.num_kept, "left_out": chosen.left_out}))
    elif name == "tokens":
        kept, store = np.load(at / "kept.npy"), TrajectoryStore(at / "s")
        file = timed("write tokens", args.rows, lambda: write_token_file(at / "t", rows_of_store(store, kept)), out)
        assert len(file) == kept.sum()
    elif name == "pack":
        file = TokenFile(at / "t")
        rows = LazyRows(file, file.num_targets, file.weights, "targets")
        settings = TrainerSettings(lr=1.0, batch_size=args.batch, epochs=1)
        packed = timed("order and pack an epoch", len(rows), lambda: pack(rows, settings, args.max_tokens), out)
        print(json.dumps({k: round(v, 3) for k, v in packed.items()}))
    else:
        store, count = TrajectoryStore(at / "s"), min(args.rows, 20_000)
        held = timed(f"hold {count} in memory", count, lambda: list(islice(store, count)), out)
        assert len(held) == count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        return run_phase(args.phase, args)
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="data-stream-"))
    try:
        for phase in PHASES:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--phase", phase, "--at", str(folder)], check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
