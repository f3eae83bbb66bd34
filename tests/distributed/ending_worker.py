"""
End a process while gloo's threads still have tensors to drop.

    accelerate launch ... -m tests.distributed.ending_worker
"""

from __future__ import annotations

from cbd_hf._ending import run_and_end


def main() -> int:
    import torch
    from accelerate import PartialState

    PartialState()

    def keep(group: object = torch.distributed.group.WORLD) -> object:
        return group

    vars(torch)["_cbd_test"] = keep  # a module with the group as a default argument, as deepspeed.comm
    works = []
    for _ in range(1000):
        tensor = torch.ones(100)
        vars(tensor)["note"] = object()  # tied to Python, and only a thread of gloo holds it at the end
        works.append(torch.distributed.all_reduce(tensor, async_op=True))
    works[0].wait()
    return 0


if __name__ == "__main__":
    run_and_end(main)
