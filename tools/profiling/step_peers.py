"""`daae profile --step --peers`: a whole MAE step of ours beside that of transformers and of lightly, on the same work.
`daae profile --step --knobs`: a step of DAAE beside one of MAE, by what makes it cheaper.

Same sizes, 75 % of the patches hidden, AdamW, one batch in memory again and again. Each peer decodes all hidden patches
and is set up as its own documentation trains it, eager and compiled; what reads "best switch" has the one setting
changed that makes it faster without changing its model, and "malloc as ours" takes its memory as we do besides. Ours
starts from uint8 crops and makes its views in the step, the others are given normalised float images.
"""

from __future__ import annotations

# The peers are not annotated, or less exactly than they are called.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportMissingImports=false
# pyright: reportPrivateImportUsage=false
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError
from tools.profiling.peer_process import measure, serve
from tools.profiling.step_records import COMPILED, OURS
from train.allocator import give_memory_back
from train.command import run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.shape import Shape
    from train.config import Run
    from train.rehearsal import Machine


@dataclass(frozen=True)
class Task:
    """What a process is told."""

    peer: str  # a key of PEERS
    preset: str  # a size, by the name of MAE's preset
    batch: int
    device: str
    precision: str
    compiled: bool = False
    objective: str = "mae"
    kept: bool = True  # memory is taken as `daae pretrain` takes it on a CPU (train.allocator)
    settings: dict[str, Any] = field(default_factory=dict)  # of the model (decoder_heads) or the method (decoded_share)


def run_of(task: Task) -> Run:
    """What ours trains: MAE or DAAE as they are by default, whatever the preset makes of them, with the settings."""
    from model.objectives import OBJECTIVES
    from train.device import resolve
    from train.presets import open_preset

    wish = open_preset(task.preset)
    model = {name: value for name, value in task.settings.items() if hasattr(wish.model, name)}
    method = {name: value for name, value in task.settings.items() if name not in model}
    wish = replace(
        wish, objective=task.objective, method=OBJECTIVES[task.objective](**method), device=task.device,
        model=replace(wish.model, **model), precision=task.precision, optim=replace(wish.optim, batch=task.batch),
        speed=replace(wish.speed, compile=task.compiled),
    )  # fmt: skip
    return resolve(wish, None)


def ours(
    task: Task,
    *,
    ledger: bool = True,
    attention: str = "auto",
    change: Callable[[Machine], None] = lambda machine: None,
    **settings: Any,
) -> Iterator[int]:
    """attention: as --speed.attention takes it. change: done before the first step. settings: as in a task, beside its
    own."""
    import torch

    from train.rehearsal import Machine

    wish = run_of(replace(task, settings={**task.settings, **settings}))
    wish = replace(wish, speed=replace(wish.speed, attention=attention))
    machine = Machine(wish, torch.device(wish.device), watched=ledger)
    machine.stepper.ledger.on = ledger
    change(machine)
    pictures = machine.random_batch(task.batch)
    machine.compile()
    while True:
        machine.step(pictures)
        machine.settle()
        yield task.batch


def transformers(task: Task, *, attention: str = "sdpa") -> Iterator[int]:
    """ViTMAEForPreTraining, which is a port of the published MAE."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    shape = run_of(task).model
    config = ViTMAEConfig(
        hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width, image_size=shape.side, patch_size=shape.patch, mask_ratio=0.75,
        decoder_hidden_size=shape.decoder_width, decoder_num_hidden_layers=shape.decoder_depth,
        decoder_num_attention_heads=shape.decoder_heads, decoder_intermediate_size=4 * shape.decoder_width,
        norm_pix_loss=True, attn_implementation=attention,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    return _steps(task, model, lambda network, images: network(images).loss)


def lightly(task: Task, *, fused: bool = True) -> Iterator[int]:
    """As in lightly's MAE example: timm's ViT masked by lightly, its decoder, squared error on the hidden patches."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    set_fused_attn(fused)
    shape = run_of(task).model

    class MAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = VisionTransformer(
                img_size=shape.side, patch_size=shape.patch, embed_dim=shape.width, depth=shape.depth,
                num_heads=shape.heads, num_classes=0,
            )  # fmt: skip
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.sequence_length = self.backbone.sequence_length
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches, patch_size=shape.patch, embed_dim=shape.width,
                decoder_embed_dim=shape.decoder_width, decoder_depth=shape.decoder_depth,
                decoder_num_heads=shape.decoder_heads, mlp_ratio=4.0, proj_drop_rate=0.0, attn_drop_rate=0.0,
            )  # fmt: skip

        def forward(self, images: Tensor) -> Tensor:
            count = len(images)
            keep, mask = utils.random_token_mask(
                size=(count, self.sequence_length), mask_ratio=0.75, device=images.device
            )
            encoded = self.backbone.encode(images=images, idx_keep=keep)
            decoded = self.decoder.embed(encoded)
            masked = utils.repeat_token(self.decoder.mask_token, (count, self.sequence_length))
            masked = utils.set_at_index(masked, keep, decoded.type_as(masked))
            predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(masked), mask))
            patches = utils.get_at_index(utils.patchify(images, shape.patch), mask - 1)  # without the class token
            return nn.functional.mse_loss(predicted, patches)

    return _steps(task, MAE(), lambda network, images: network(images))


def _steps(task: Task, network: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[int]:
    import torch

    from train.device import autocast

    wish = run_of(task)
    device, precision, side = torch.device(wish.device), wish.precision, wish.model.side
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    images = torch.randn(task.batch, 3, side, side, device=device)
    if task.compiled:
        network.compile()
    while True:
        optimizer.zero_grad()
        with autocast(device, precision):
            value = loss(network, images)
        value.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield task.batch


PLAIN = "best switch (plain attention)"
PEERS: dict[str, Callable[[Task], Iterator[int]]] = {
    OURS: ours,
    f"{OURS}, without the ledger": lambda task: ours(task, ledger=False),
    f"{OURS}, attention left to torch": lambda task: ours(task, attention="any"),
    f"{OURS}, malloc as it comes": ours,
    f"{OURS}, decoder heads of 64": lambda task: ours(task, **KNOBS["decoder heads of 64"](run_of(task).model)),
    "transformers": transformers,
    f"transformers, {PLAIN}": lambda task: transformers(task, attention="eager"),
    "transformers, plain attention, malloc as ours": lambda task: transformers(task, attention="eager"),
    "lightly": lightly,
    f"lightly, {PLAIN}": lambda task: lightly(task, fused=False),
    "lightly, plain attention, malloc as ours": lambda task: lightly(task, fused=False),
}
ALSO_COMPILED = (OURS, "transformers", f"transformers, {PLAIN}", "lightly", f"lightly, {PLAIN}")
TOGETHER = {"cpu": 6, "cuda": 3}  # processes, each with a network, gradients and moments, of what fits the memory

# What makes a step of DAAE cheaper, or dearer, for a size.
KNOBS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "as published": lambda shape: {},
    "decoder heads of 64": lambda shape: {"decoder_heads": max(1, shape.decoder_width // 64)},
    "half the decoder's depth": lambda shape: {"decoder_depth": shape.decoder_depth // 2},
    "half the decoder's width": lambda shape: {
        "decoder_width": shape.decoder_width // 2, "decoder_heads": max(1, shape.decoder_heads // 2)
    },
    "half of the hidden patches decoded": lambda shape: {"decoded_share": 0.5},
    "a quarter of them decoded": lambda shape: {"decoded_share": 0.25},
    "half the depth, half decoded": lambda shape: {"decoder_depth": shape.decoder_depth // 2, "decoded_share": 0.5},
    "a row of patches less in the small view": lambda shape: {"small": (shape.grid // 2 - 1) / shape.grid},
    "a row of patches more": lambda shape: {"small": (shape.grid // 2 + 1) / shape.grid},
    "half of the small view left out": lambda shape: {"small_drop": 0.5},
    "no gradient through the small view": lambda shape: {"target": "stop"},
    "a momentum encoder behind it": lambda shape: {"target": "ema"},
}  # fmt: skip


def check_size(wish: Run, config: object) -> None:
    """Raises UsageError where a preset is no size of MAE, or settings beside it would be left out."""
    if not wish.preset.startswith("mae-") or config is not None:
        raise UsageError(
            "--step with --peers, --knobs or --techniques takes a size, as --preset mae-vits16 names one; no --config."
        )


def compare_steps(task: Task, *, seconds: float, say: Callable[[str], None]) -> dict[str, dict]:
    """peer -> rates, and under "beside" ours of the same rounds, under "beside_compiled" ours compiled where the task
    is. seconds: of each, in all rounds together."""
    there: dict[str, list[str]] = {}
    for name in PEERS:
        package = name.partition(",")[0]
        if package != OURS and find_spec(package) is None:
            print(f"note: {name} is left out: {package} is not installed.", file=sys.stderr)
            continue
        kept = name.endswith("malloc as ours") or (package == OURS and not name.endswith("malloc as it comes"))
        there[name] = _command(replace(task, peer=name, compiled=False, kept=kept))
        if task.compiled and name in ALSO_COMPILED:
            there[name + COMPILED] = _command(replace(task, peer=name, kept=kept))
    return few_at_once(there, {"beside": OURS, "beside_compiled": OURS + COMPILED}, task.device, seconds, say)


def few_at_once(
    commands: dict[str, list[str]], beside: dict[str, str], device: str, seconds: float, say: Callable[[str], None]
) -> dict[str, dict]:
    """name -> rates, with those of some contenders in the same rounds under the keys of `beside`.

    Each holds a network, gradients and moments, and all at once may not fit the memory: these are timed with each few.
    """
    beside = {key: name for key, name in beside.items() if name in commands}
    mine, found = list(beside.values()), {}
    others = [name for name in commands if name not in mine]
    few = TOGETHER[device.partition(":")[0]] - len(mine)
    for start in range(0, max(1, len(others)), few):
        rates = measure({name: commands[name] for name in [*mine, *others[start : start + few]]}, seconds, say)
        same = {key: rates[name]["rounds"]["images_per_second"] for key, name in beside.items()}
        found |= {name: {**each, **same} for name, each in rates.items() if name not in found}
    return found


def compare_knobs(task: Task, *, seconds: float, say: Callable[[str], None]) -> dict[str, dict]:
    """knob -> its settings; of "mae", of "daae" with it and of "mae with the same" their FLOPs beside MAE's, and their
    rates in the same rounds. A knob of the small view has no third. seconds: of each, in all rounds together."""
    found, plain = {}, run_of(task)
    for name, knob in KNOBS.items():
        settings = knob(plain.model)
        tasks = {"mae": task, "daae": replace(task, objective="daae", settings=settings)}
        known = {key: value for key, value in settings.items() if hasattr(plain.model, key) or key == "decoded_share"}
        if known:
            tasks["mae with the same"] = replace(task, settings=known)
        commands = {each: _command(one) for each, one in tasks.items()}
        rates = measure(commands, seconds, lambda doing, name=name: say(f"{name}: {doing}"))
        flops = {each: _macs(run_of(one)) / _macs(plain) for each, one in tasks.items()}
        found[name] = {"settings": settings, "flops": flops, "rates": rates}
    return found


def _macs(wish: Run) -> int:
    return wish.method.macs(wish.model)


def _command(task: Task) -> list[str]:
    return ["tools.profiling.step_peers", json.dumps(asdict(task))]


def show(heading: str, table: list[list[str]]) -> None:
    """heading: a line above. table: its headings, then its rows."""
    from tools.tables import plain_table, print_whole

    shown = plain_table()
    for name in table[0]:
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in table[1:]:
        shown.add_row(*row)
    print(f"{heading}\n")
    print_whole(shown)


def main(argv: list[str]) -> int:
    task = Task(**json.loads(argv[0]))
    if not task.kept:
        give_memory_back()
    serve(lambda: PEERS[task.peer](task))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
