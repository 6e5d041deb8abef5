"""Peak memory and time of a loss over the vocabulary, forward and backward: plain against chunked.

    OMP_NUM_THREADS=2 .venv/bin/python bench/loss_memory.py
    OMP_NUM_THREADS=2 .venv/bin/python bench/loss_memory.py --losses cross_entropy --dtypes bfloat16 --rounds 5

Each measurement is a process of its own: it makes the inputs, runs a small warm-up (threads, kernels), notes its peak
resident set (VmHWM, reset before the run), and runs the loss once cold, then `--repeats` times warm. "MB" is the peak
above what was resident before the run, so the gradients it leaves are in it and the inputs are not; "s" is the best
warm time in that process, "cold s" the first. Plain and chunked alternate; medians over rounds, ratios within a round.
On a machine that does other work the CPU time ratio is the one to read, at OMP_NUM_THREADS=1: wall times then measure
the neighbours, and a second thread spends CPU time waiting for the first.
Plain is the same public function on whole logits: hidden @ weight.T, then `forward_kl` and so on; its cross-entropy
is torch.nn.functional.cross_entropy on float32 logits. Nothing is written unless --out FILE.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LOSSES = ("cross_entropy", "forward_kl", "reverse_kl", "jsd")


def status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{field} is not in /proc/self/status: this benchmark needs Linux")


def build_run(loss: str, form: str, dtype_name: str, n: int, v: int, d: int) -> Callable[[], float]:
    import torch
    import torch.nn.functional as F

    from tutelage import numerics

    dtype = getattr(torch, dtype_name)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=g) / d**0.5 * 2).to(dtype).requires_grad_()
    teacher_hidden = torch.randn(n, d, generator=g).to(dtype)
    teacher_weight = (torch.randn(v, d, generator=g) / d**0.5 * 2).to(dtype)
    ids = torch.randint(0, v, (n,), generator=g)

    def plain() -> torch.Tensor:
        logits = hidden @ weight.t()
        if loss == "cross_entropy":
            return F.cross_entropy(logits.float(), ids, reduction="sum") / n
        with torch.no_grad():
            teacher_logits = teacher_hidden @ teacher_weight.t()
        return getattr(numerics, loss)(logits, teacher_logits).sum() / n

    def chunked() -> torch.Tensor:
        if loss == "cross_entropy":
            return numerics.chunked_loss(hidden, weight, {"target_ids_C": ids}, numerics.cross_entropy, divisor=n)[0]
        loss_fn = numerics.TeacherHeadLoss(getattr(numerics, loss), teacher_weight)
        return numerics.chunked_loss(hidden, weight, {"teacher_hidden_CE": teacher_hidden}, loss_fn, divisor=n)[0]

    def run() -> float:
        hidden.grad = weight.grad = None
        out = plain() if form == "plain" else chunked()
        out.backward()
        return float(out.detach())

    return run


def measure_here(args: argparse.Namespace) -> None:
    build_run(args.loss, args.form, args.dtype, 64, 512, args.width)()
    run = build_run(args.loss, args.form, args.dtype, args.tokens, args.vocabulary, args.width)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mb("VmRSS")
    start = time.perf_counter()
    value = run()
    cold = time.perf_counter() - start
    peak = status_mb("VmHWM") - before
    times, cpu_times = [], []
    for _ in range(args.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    print(json.dumps({"mb": peak, "s": min(times), "cpu_s": min(cpu_times), "cold_s": cold, "value": value}))


def measure(args: argparse.Namespace, loss: str, form: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", "--loss", loss, "--form", form, "--dtype", dtype]
    command += ["--tokens", str(args.tokens), "--vocabulary", str(args.vocabulary), "--width", str(args.width)]
    command += ["--repeats", str(args.repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{loss} {form} {dtype} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(args: argparse.Namespace) -> str:
    import torch

    lines = [
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, "
        f"{args.tokens} targets x {args.vocabulary} x d={args.width}, {args.rounds} rounds, "
        f"best of {args.repeats} warm runs in each; load average {os.getloadavg()[0]:.1f} at the start.",
        "",
        "| loss | dtype | plain MB | chunked MB | memory ratio | plain s | chunked s | time ratio "
        "| CPU time ratio | cold plain s | cold chunked s | value gap |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype in args.dtypes:
        for loss in args.losses:
            found: dict[str, list[dict[str, float]]] = {"plain": [], "chunked": []}
            for _ in range(args.rounds):
                for form in found:
                    found[form].append(measure(args, loss, form, dtype))
                    print(f"  {loss} {dtype} {form}: {found[form][-1]}", file=sys.stderr)
            mid = {f: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for f, rows in found.items()}
            ratio = {
                k: statistics.median(c[k] / p[k] for p, c in zip(found["plain"], found["chunked"], strict=True))
                for k in ("s", "cpu_s")
            }
            p, c = mid["plain"], mid["chunked"]
            lines.append(
                f"| {loss} | {dtype} | {p['mb']:.0f} | {c['mb']:.0f} | {c['mb'] / p['mb']:.3f} "
                f"| {p['s']:.2f} | {c['s']:.2f} | {ratio['s']:.2f} "
                f"| {ratio['cpu_s']:.2f} | {p['cold_s']:.2f} | {c['cold_s']:.2f} | {abs(p['value'] - c['value']):.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="warm runs, at least 1")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="append the table to this file")
    parser.add_argument("--one", action="store_true", help="one measurement, in this process")
    parser.add_argument("--loss")
    parser.add_argument("--form")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    if args.one:
        measure_here(args)
        return
    text = table(args)
    print(text)
    if args.out is not None:
        with args.out.open("a") as f:
            f.write(text + "\n\n")


if __name__ == "__main__":
    main()
