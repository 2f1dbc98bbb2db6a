"""`daae profile --step --peers`: a whole MAE step of ours beside that of transformers and of lightly, on the same work.

Same sizes, 75 % of the patches hidden, all of them decoded, AdamW, one batch in memory again and again. Each peer is
set up as its own documentation trains it, eager and compiled; what reads "best switch" has the one setting changed that
makes it faster without changing its model. Ours starts from uint8 crops and makes its views in the step, the others are
given normalised float images.
"""

from __future__ import annotations

# The peers are not annotated, or less exactly than they are called.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportMissingImports=false
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tools.peer_process import measure, ratio, serve
from train.command import run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.config import Run


@dataclass(frozen=True)
class Task:
    """What a peer process is told."""

    peer: str
    preset: str
    batch: int
    device: str
    precision: str


def _run(task: Task) -> Run:
    from train.device import resolve
    from train.presets import open_preset

    wish = replace(open_preset(task.preset), device=task.device, precision=task.precision)
    return resolve(wish, None)


def ours(task: Task, *, compiled: bool = False, preset: str | None = None, **settings: Any) -> Iterator[int]:
    """settings: of the model (decoder_heads=8) or of the method (decoded_share=0.5)."""
    import torch

    from train.rehearsal import Machine

    wish = _run(replace(task, preset=preset or task.preset))
    model = {name: value for name, value in settings.items() if hasattr(wish.model, name)}
    method = {name: value for name, value in settings.items() if name not in model}
    wish = replace(
        wish, model=replace(wish.model, **model), method=replace(wish.method, **method),
        speed=replace(wish.speed, compile=compiled), optim=replace(wish.optim, batch=task.batch),
    )  # fmt: skip
    machine = Machine(wish, torch.device(wish.device))
    pictures = machine.random_batch(task.batch)
    machine.compile()
    while True:
        machine.step(pictures)
        machine.settle()
        yield task.batch


def transformers(task: Task, *, compiled: bool = False, attention: str = "sdpa") -> Iterator[int]:
    """ViTMAEForPreTraining, which is a port of the published MAE."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    shape = _run(task).model
    config = ViTMAEConfig(
        hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width, image_size=shape.side, patch_size=shape.patch, mask_ratio=0.75,
        decoder_hidden_size=shape.decoder_width, decoder_num_hidden_layers=shape.decoder_depth,
        decoder_num_attention_heads=shape.decoder_heads, decoder_intermediate_size=4 * shape.decoder_width,
        norm_pix_loss=True, attn_implementation=attention,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    return _steps(task, model, lambda network, images: network(images).loss, compiled)


def lightly(task: Task, *, compiled: bool = False) -> Iterator[int]:
    """As in lightly's MAE example: timm's ViT masked by lightly, its decoder, squared error on the hidden patches."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    shape = _run(task).model

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

    return _steps(task, MAE(), lambda network, images: network(images), compiled)


def _steps(
    task: Task, network: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], compiled: bool
) -> Iterator[int]:
    import torch

    from train.device import autocast

    device, precision, side = torch.device(_run(task).device), _run(task).precision, _run(task).model.side
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    images = torch.randn(task.batch, 3, side, side, device=device)
    if compiled:
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


OURS, OURS_COMPILED = "DAAE project, MAE", "DAAE project, MAE, compiled"
PEERS: dict[str, Callable[[Task], Iterator[int]]] = {
    OURS: ours,
    OURS_COMPILED: lambda task: ours(task, compiled=True),
    "  decoder heads of 64": lambda task: ours(task, decoder_heads=max(1, _run(task).model.decoder_width // 64)),
    "  half of the hidden patches decoded": lambda task: ours(task, decoded_share=0.5),
    "DAAE project, DAAE": lambda task: ours(task, preset=task.preset.replace("mae-", "daae-", 1)),
    "  half of the hidden patches decoded, DAAE": lambda task: ours(
        task, preset=task.preset.replace("mae-", "daae-", 1), decoded_share=0.5
    ),
    "  no gradient through the small view, DAAE": lambda task: ours(
        task, preset=task.preset.replace("mae-", "daae-", 1), target="stop"
    ),
    "transformers": transformers,
    "transformers, best switch (plain attention)": lambda task: transformers(task, attention="eager"),
    "transformers, compiled": lambda task: transformers(task, compiled=True),
    "lightly": lightly,
    "lightly, compiled": lambda task: lightly(task, compiled=True),
}


def compare_steps(
    preset: str, *, seconds: float, batch: int, device: str, precision: str, compiled: bool, say: Callable[[str], None]
) -> dict[str, dict]:
    """peer -> rates. seconds: of each, in all rounds together."""
    there = {}
    for name in PEERS:
        package = next((each for each in ("transformers", "lightly") if name.startswith(each)), None)
        with contextlib.suppress(ModuleNotFoundError):
            if package is not None and find_spec(package) is None:
                print(f"note: {name} is left out: {package} is not installed.", file=sys.stderr)
                continue
        if "compiled" in name and not compiled:
            continue
        there[name] = ["tools.step_peers", json.dumps(asdict(Task(name, preset, batch, device, precision)))]
    return measure(there, seconds, say)


def show(found: dict[str, dict], gflop: float, ceiling: float) -> None:
    """Rates beside ours, and the share of the machine's products that the documented FLOPs come to."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("", "images/s", "min to max", "ours is", "MFU"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, each in found.items():
        rate = each["images_per_second"]
        same = "DAAE" not in name.removeprefix("DAAE project") and not name.startswith(" ")
        table.add_row(
            name, f"{rate:,.3g}", f"{each['slowest']:,.3g} to {each['fastest']:,.3g}",
            f"{ratio(found[OURS], each, 'images_per_second'):.2f}x",
            f"{rate * gflop * 1e9 / ceiling:.0%}" if same else "",
        )  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def main(argv: list[str]) -> int:
    task = Task(**json.loads(argv[0]))
    serve(lambda: PEERS[task.peer](task))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
