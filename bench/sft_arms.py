"""What the SFT benchmarks share: conversations, our trainer on the real path, TRL's, and one evaluator for both."""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(os.environ.get("TUTELAGE_SHARED_DATA", "../shared/data")) / "gsm8k"


@dataclasses.dataclass
class Step:
    """One update. `tokens` are real ones: prompt and answer, no padding."""

    tokens: int
    targets: int
    wall_s: float
    cpu_s: float
    loss: float = 0.0


class Clock:
    """Wall and CPU seconds since the last lap; time spent paused does not count."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        wall, cpu = self.wall, self.cpu
        self.restart()
        return self.wall - wall, self.cpu - cpu


def conversations(count: int, *, split: str = "train") -> list[dict[str, Any]]:
    """The first `count` GSM8K questions with worked answers, as prompt and completion messages."""
    rows = []
    with open(DATA / f"{split}.jsonl", encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            prompt = [{"role": "user", "content": record["question"]}]
            rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": record["answer"]}]})
            if len(rows) == count:
                break
    return rows


class Ours:
    """Workbench, Trainer and HardTargets, as `tutelage train` puts them together.

    Args:
        precision: of the weights in forward and backward; masters are float32 either way.
        is_fused: whether the cheaper forms of norms, MLPs and attention are used, or transformers' own.
    """

    def __init__(
        self,
        *,
        limit: int,
        batch: int,
        lr: float,
        seed: int,
        precision: str = "bfloat16",
        max_tokens: int = 2048,
        is_fused: bool = True,
    ) -> None:
        from tutelage.methods.config import load_config
        from tutelage.methods.workbench import Workbench
        from tutelage.signals import HardTargets
        from tutelage.types import Draw

        self.seed = seed
        train = {"lr": lr, "batch_size": batch, "epochs": 1, "schedule": "constant", "warmup": 0.0}
        train |= {"max_tokens": max_tokens}
        body = {
            "method": "sft",
            "seed": seed,
            "model": {"name": "smollm2-135m-instruct", "precision": precision, "fused_layers": is_fused},
            "data": {"path": str((DATA / "train.jsonl").resolve()), "limit": limit},
            "train": train,
        }
        config, folder = load_config(body)
        self.bench = Workbench(config, folder)
        stage: Any = config.stages[0]
        self.signal = HardTargets()
        draw = Draw(groups=tuple(self.bench.demonstrations(stage.data)))
        self.targets = self.signal.prepare(draw, score_student=lambda ts: [])
        self.settings = self.bench.trainer_settings(stage.train, lr=lr, lora_factor=1.0)
        self.trainer = self.bench.trainer

    def steps(self, most: int, *, after: Callable[[int], None] | None = None) -> Iterator[Step]:
        """Up to `most` updates; `after` is called outside the timed part, with the updates made."""
        from tutelage.train.trainer import Place

        place = Place(seed=self.seed, stage=0, round=0, num_rounds=1)
        clock = Clock()
        for number, record in enumerate(self.trainer.steps(self.targets, self.signal, self.settings, place), 1):
            wall, cpu = clock.lap()
            m = record.metrics
            yield Step(int(m["data/num_tokens"]), int(m["data/num_targets"]), wall, cpu, m["train/loss"])
            if after is not None:
                after(number)
            if number == most:
                return
            clock.restart()

    def weights(self) -> dict[str, torch.Tensor]:
        return self.trainer.optimizer.weights()

    def order(self) -> list[int]:
        """Indices of the conversations in the order they are trained on."""
        from tutelage.train.trainer import Place

        place = Place(seed=self.seed, stage=0, round=0, num_rounds=1)
        return [i for batch in self.trainer.batches(self.targets.rows, self.settings, place) for i in batch]


def trl_trainer(
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    dtype: str = "bfloat16",
    on_step: Callable[[Any, Step], None],
    **options: Any,
) -> Any:
    """TRL's SFTTrainer on prompts and completions, loss on completions only; `on_step` gets the model and each step.

    Args:
        dtype: of the weights. "bfloat16" trains without float32 masters, which is TRL's fastest form; "float32"
            has bfloat16 autocast.
        options: further fields of SFTConfig (batch size, packing, lengths).
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    from tutelage.policies.smollm2 import smollm2_path

    config = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        completion_only_loss=True,
        model_init_kwargs={"dtype": dtype, "attn_implementation": "sdpa"},
        **options,
    )
    clock, seen, logged = Clock(), {"tokens": 0, "targets": 0}, {"loss": 0.0}

    class Timed(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen["tokens"] += int(mask.sum() if mask is not None else (inputs["input_ids"] != self.pad).sum())
            seen["targets"] += int((inputs["labels"] != -100).sum())
            return super().training_step(model, inputs, *args, **kwargs)

        pad = -1

    class Record(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.restart()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged["loss"] = float((logs or {}).get("loss", logged["loss"]))

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            wall, cpu = clock.lap()
            on_step(model, Step(seen["tokens"], seen["targets"], wall, cpu))
            seen.update(tokens=0, targets=0)
            clock.restart()

    path = str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = Timed(
        model=path, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Record()]
    )
    return trainer


class HeldOut:
    """Mean nats per answer token of held-out conversations, in float32, by plain transformers: the same for both."""

    def __init__(self, count: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tutelage.policies.smollm2 import smollm2_path

        tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
        self.model: Any = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32).eval()
        self.cases: list[tuple[list[int], int]] = []
        for row in conversations(count, split="test"):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            answer = tokenizer(row["completion"][0]["content"] + "<|im_end|>", add_special_tokens=False).input_ids
            self.cases.append((prompt + answer, len(prompt)))
        self.cases.sort(key=lambda case: len(case[0]))

    @torch.no_grad()
    def loss(self, weights: dict[str, torch.Tensor]) -> float:
        own = dict(self.model.named_parameters())
        for name, value in weights.items():
            own[name].copy_(value)
        total, count = 0.0, 0
        for ids, start in self.cases:
            hidden = self.model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[
                0, start - 1 : -1
            ]
            logits = self.model.lm_head(hidden)
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
            count += len(ids) - start
        return total / count


def machine() -> str:
    """CPU, cores, threads, load and versions, for a result's first line."""
    import transformers
    import trl

    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    )


def bfloat16_ceiling(repeats: int = 5) -> tuple[float, float]:
    """Billions of operations a second (wall, CPU) of a 2048-cubed bfloat16 matrix product, the best of some."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    best = np.array([0.0, 0.0])
    for _ in range(repeats):
        clock = Clock()
        torch.mm(a, b, out=out)
        best = np.maximum(best, 2 * 2048**3 / 1e9 / np.array(clock.lap()))
    return float(best[0]), float(best[1])
