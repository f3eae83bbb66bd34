"""Where the teacher's weights lie: whole on every device, a share on each, or in the CPU's memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate import cpu_offload
from torch import nn

from cbd_hf.distillation.heads import decoder_layers


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

PLACEMENTS = ("auto", "offload", "replicate", "shard")


def choose_placement(placement: str, accelerator: Accelerator) -> str:
    """
    What `"auto"` means here: `"shard"` where the student's weights are sharded (ZeRO-3, FSDP), else `"replicate"`.

    Raises:
        ValueError: the placement is unknown, or impossible with the student's.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"teacher_placement={placement!r} is unknown; choose one of {', '.join(PLACEMENTS)}.")
    zero3 = _zero_stage(accelerator) == 3
    sharded = zero3 or getattr(accelerator.state, "fsdp_plugin", None) is not None
    if placement == "auto":
        return "shard" if sharded else "replicate"
    if placement == "replicate" and zero3:
        raise ValueError(
            "teacher_placement='replicate' is not possible under ZeRO-3, which shards every model that is loaded: "
            "choose 'shard' or 'offload', or train under ZeRO-2."
        )
    return placement


def place_teacher(teacher: PreTrainedModel, accelerator: Accelerator, placement: str = "auto") -> nn.Module:
    """
    Put the teacher, frozen and in evaluation mode, where it shall run.

    Args:
        teacher (`PreTrainedModel`): on the CPU, or as ZeRO-3 has loaded it, or spread over devices by `device_map`.
        accelerator (`Accelerator`): the student's.
        placement (`str`, *optional*, defaults to `"auto"`): `"replicate"`: whole on every device; `"shard"`: an
            n-th on each of n devices, by DeepSpeed under ZeRO-3 and by torch's `fully_shard` otherwise, and one layer
            whole at a time (under ZeRO-3 up to two); `"offload"`: in the CPU's memory, one layer on the device at a
            time; `"auto"`: see [`choose_placement`]. With `"auto"` and `"replicate"` a teacher that is spread over
            devices stays where it is.

    Returns:
        `nn.Module`: to be called in place of the teacher; its parameters are the teacher's.

    Raises:
        ValueError: see [`choose_placement`]; or the teacher is spread over devices, and there are several processes
            or another placement is asked for.
    """
    spread = len(set((getattr(teacher, "hf_device_map", None) or {}).values())) > 1
    if spread:
        _check_spread(teacher, accelerator, placement)
    placement = choose_placement(placement, accelerator)
    teacher.requires_grad_(False)
    teacher.eval()
    if spread:
        return teacher
    if _zero_stage(accelerator) == 3:
        return _zero3(teacher, accelerator, offload=placement == "offload")
    if placement == "offload":
        if accelerator.device.type == "cpu":
            return teacher  # it lies there already
        return cpu_offload(teacher, execution_device=accelerator.device)
    if placement == "shard" and accelerator.num_processes > 1:
        return _fully_shard(teacher, accelerator)
    return teacher.to(accelerator.device)


def _check_spread(teacher: Any, accelerator: Accelerator, placement: str) -> None:
    devices = ", ".join(sorted({str(device) for device in teacher.hf_device_map.values()}))
    if accelerator.num_processes > 1 or _zero_stage(accelerator) == 3:
        raise ValueError(
            f"The teacher was loaded with a device_map over several devices ({devices}), which only one process can "
            "use, and not under ZeRO-3: leave device_map out and choose teacher_placement='shard' or 'offload'."
        )
    if placement not in ("auto", "replicate"):
        raise ValueError(
            f"teacher_placement={placement!r} cannot move a teacher that was loaded with a device_map over several "
            f"devices ({devices}): leave device_map out, or choose 'auto'."
        )


def _zero_stage(accelerator: Accelerator) -> int | None:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


def _zero3(teacher: Any, accelerator: Accelerator, offload: bool) -> nn.Module:
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):  # of training
        config.pop(name, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    layers: list[Any] = decoder_layers(teacher)
    layer = max((sum(p.ds_numel for p in each.parameters()) for each in layers), default=0)
    # By default DeepSpeed keeps up to 10^9 parameters whole that it will need again, which here is in the next batch's
    # forward, and gathers 5 * 10^7 ahead: all of a small teacher. Here a layer is released at once and one is gathered
    # ahead.
    zero |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 2 * layer}
    zero["stage3_prefetch_bucket_size"] = layer
    engine, *_ = deepspeed.initialize(model=teacher, config=config)
    engine.eval()
    if offload:  # the shards lie where the training's own options have put them; gathering copies them to the device
        for parameter in teacher.parameters():
            parameter.ds_tensor.data = parameter.ds_tensor.data.to("cpu")
    return engine


def _fully_shard(teacher: Any, accelerator: Accelerator) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    embeddings, head = teacher.get_input_embeddings(), teacher.get_output_embeddings()
    if head is not None and embeddings.weight is not head.weight:
        # By themselves, not with all that is in no layer, which is whole while the layers run.
        fully_shard(embeddings, mesh=mesh, reshard_after_forward=True)
        fully_shard(head, mesh=mesh, reshard_after_forward=True)
    for layer in decoder_layers(teacher):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # moves its share to the device
    # Sharded again after the forward, which has no backward here: else embeddings and head would stay whole.
    return fully_shard(teacher, mesh=mesh, reshard_after_forward=True)


__all__ = ["PLACEMENTS", "choose_placement", "place_teacher"]
