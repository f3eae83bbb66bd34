"""
Build a chain over and over, killed at random moments, until enough kills have happened; writes what came of it.

Everything is imported once; every attempt is a fork of this process. An attempt counts what it does to files: every
file that is opened for writing, renamed or removed, and the middle of every write of weights or of an optimizer. It is
killed at a number of that count which is drawn before, or by this process after a time that is drawn before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
import transformers.trainer
from transformers import AutoConfig

from cbd_hf import StepwiseDistillationConfig
from cbd_hf._manifest import MANIFEST, read_manifest
from cbd_hf.distillation.builder import build_chain
from cbd_hf.distillation.checkpoints import last_complete_checkpoint
from cbd_hf.distillation.recipe import BuildArguments
from cbd_hf.distillation.trainer import StepwiseDistillationTrainer
from cbd_hf.families import get_family
from cbd_hf.report.card import chain_card


with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401  # accelerate imports it if it is there

assert StepwiseDistillationTrainer and transformers.trainer and chain_card  # imported once for all attempts

# One kill in each of these, wherever they come first: (what, where, how often it happens before).
AIMED = [
    ("torn", "source-supervised-trainer/checkpoint-2/optimizer.pt", 0),
    ("torn", "source-supervised.partial/model.safetensors", 0),
    ("torn", "mid/trainer/checkpoint-3/model.safetensors", 0),
    ("open", "mid/trainer/checkpoint-4/.cbd_complete", 0),
    ("rmtree", "mid/trainer/checkpoint-3", 0),
    ("remove", "mid/trainer/checkpoint-4", 2),
    ("rename", "mid/trained", 1),
    ("rename", "chain/anchors/0-mid", 0),
    ("rename", "chain/chain.json", 0),
    ("remove", "small/trainer", 3),
]


class Watch:
    """Counts what this process does to files below `root`, and ends it when told."""

    def __init__(self, root: Path, report: int, at: int | None, aim: tuple[str, str, int] | None) -> None:
        self.root = f"{root}/"
        self.report = report
        self.at = at
        self.aim = aim
        self.count = 0
        self.seen = 0
        self.removing = ""

    def install(self) -> None:
        sys.addaudithook(self.hook)
        torch.save = self.torn(torch.save, 1)  # type: ignore[assignment]
        name = "safe_save_file"
        setattr(transformers.modeling_utils, name, self.torn(getattr(transformers.modeling_utils, name), 1))

    def torn(self, function: Callable[..., Any], position: int) -> Callable[..., Any]:
        """Lets `function` write its file, then cuts it in half if this is the moment."""

        def write(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            path = str(args[position])
            if path.startswith(self.root) and self.now("torn", path[len(self.root) :]):
                os.truncate(path, os.path.getsize(path) // 2)
                self.die("torn", path)
            return result

        return write

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(str(mode)) & set("wax+")
            what = "open" if writes else None
        else:
            what = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "remove", "shutil.rmtree": "rmtree"}.get(
                event
            )
            path = args[1] if what == "rename" else args[0] if args else None
        if what is None or isinstance(path, int):
            return
        path = os.fsdecode(path)
        if what == "rmtree":
            self.removing = path
        elif what == "remove" and not path.startswith("/"):
            path = f"{self.removing}/{path}"  # rmtree removes by names in an open directory
        if path.startswith(self.root):
            where = path[len(self.root) :]
            if self.now(what, where):
                self.die(what, where)

    def now(self, what: str, where: str) -> bool:
        self.count += 1
        if self.aim is not None and what == self.aim[0] and self.aim[1] in where:
            self.seen += 1
            return self.seen > self.aim[2]
        return self.count == self.at

    def die(self, what: str, where: str) -> None:
        os.write(self.report, f"{what} {where}".encode())
        os.kill(os.getpid(), signal.SIGKILL)


def attempt(
    recipe: dict[str, Any],
    *,
    at: int | None = None,
    aim: tuple[str, str, int] | None = None,
    after: float | None = None,
) -> tuple[bool, str]:
    """Whether a forked build came to its end, and the moment of its death (or how many moments there were)."""
    reader, writer = os.pipe()
    root = Path(recipe["output_dir"]).parent
    child = os.fork()
    if not child:
        os.close(reader)
        log = os.open(root.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        watch = Watch(root, writer, at, aim)
        watch.install()
        code = 1
        try:
            build(recipe)
            os.write(writer, str(watch.count).encode())
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    moment = ""
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        moment = f"after {after:.2f} s"
    with os.fdopen(reader, "rb") as pipe:
        reported = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        # The time can be up in the last moments of a build that has reported its end.
        return False, moment or reported
    assert os.WEXITSTATUS(status) == 0, (root.parent / "log.txt").read_text()[-6000:]
    return True, reported


def build(recipe: dict[str, Any]) -> None:
    names = BuildArguments.__dataclass_fields__
    args = BuildArguments(**{name: value for name, value in recipe.items() if name in names})
    training = {name: value for name, value in recipe.items() if name not in names}
    build_chain(args, StepwiseDistillationConfig(**training))


def progress(chain: Path) -> tuple[int, int, int]:
    """How far a build has come for good: finished anchors, phase of the next one, steps in its last checkpoint."""
    work = Path(f"{chain}.build")
    finished = len(read_manifest(chain)["anchors"]) if (chain / MANIFEST).is_file() else 0
    if finished == 2:
        return 2, 0, 0
    stage = work / ("mid", "small")[finished]
    if (stage / "trained").is_dir():
        return finished, 2, 0
    prepared = (work / "source-supervised").is_dir()
    last = last_complete_checkpoint(stage / "trainer" if prepared else work / "source-supervised-trainer")
    return finished, int(prepared), int(last.rpartition("-")[2]) if last else 0


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    recipe = json.loads((directory / "recipe.json").read_text())
    get_family(AutoConfig.from_pretrained(recipe["source"]))  # learnt once
    gc.collect()
    gc.freeze()  # accelerate collects garbage often
    wanted = recipe.pop("kills")
    rng = random.Random(recipe.pop("kill_seed"))

    def in_directory(name: str) -> dict[str, Any]:
        (directory / name).mkdir()
        return recipe | {"output_dir": str(directory / name / "chain")}

    started = time.perf_counter()
    finished, moments = attempt(in_directory("whole"))
    seconds = time.perf_counter() - started
    assert finished
    aims, kills, runs = list(AIMED), [], 0
    wanted += len(aims)
    while aims or len(kills) < wanted:
        run = in_directory(f"killed-{runs}")
        runs += 1
        finished = False
        while not finished:
            plan: dict[str, Any] = {}
            if aims:
                plan["aim"] = aims.pop(0)
            elif len(kills) >= wanted:
                pass
            elif rng.random() < 0.5:
                plan["after"] = rng.uniform(0.1, 0.6) * seconds
            else:
                plan["at"] = rng.randint(1, int(moments) // 3)
            before = progress(Path(run["output_dir"]))
            finished, moment = attempt(run, **plan)
            print(f"run {runs - 1}: {moment} {plan}", file=sys.stderr, flush=True)
            assert progress(Path(run["output_dir"])) >= before, f"{before} was lost"
            if not finished:
                kills.append({"run": runs - 1, "moment": moment, "plan": plan})
            elif "aim" in plan:
                raise AssertionError(f"the build ended without {plan['aim']}")
    result = {"runs": runs, "kills": kills, "moments": int(moments), "seconds": seconds}
    (directory / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
