"""What the pretraining tests share, importable from spawned processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rsosm_cli.models.encodings import values_of
from rsosm_cli.settings import PretrainSettings
from rsosm_cli.training.pretrain import Inputs, Job, Trainer
from rsosm_cli.training.ranks import average_gradients


def small_settings(**changes: Any) -> PretrainSettings:
    """Return settings of a training that takes seconds; ``changes`` are those of the top level."""
    values: dict[str, Any] = {
        "model": {
            "image_encoder": "vit_tiny_patch16_224", "image_size": 32, "image_depth": 3, "decoder_width": 32,
            "decoder_depth": 1, "decoder_heads": 2, "fusion_width": 64, "fusion_heads": 2, "contrastive_weight": 0.1,
        },
        "optim": {"epochs": 3, "batch_size": 8, "warmup_epochs": 1, "lr": 8e-3},
        "holdout": 0.25,
        "workers": 0,
        "checkpoint_minutes": 1e-6,
        "seed": 3,
    }  # fmt: skip
    return PretrainSettings.model_validate({**values, **changes})


def losses_and_gradients(
    fabric: Any, progress: Any, job: Job, steps: list[int], *, double: bool = False
) -> list[dict[str, Any]]:
    """Return, a step, the loss over all ranks, every gradient, and how many objects this rank has."""
    torch.set_num_threads(1)
    trainer = Trainer(fabric, progress, job)
    if double:
        trainer.model.double()
    found = []
    for step in steps:
        trainer.model.train()
        trainer.optimizer.zero_grad()
        batch = trainer.batches[0, step]
        inputs = trainer.inputs(batch, 0)
        losses = trainer.losses(in_double(inputs) if double else inputs)
        losses.total.backward()
        average_gradients(trainer.model)
        values = fabric.all_reduce(values_of(losses), reduce_op="mean")
        objects = sum(len(n.osm_id) for n in batch.graphs.nodes.values())
        found.append(
            {
                "losses": values.tolist(),
                "objects": fabric.all_gather(torch.tensor([objects])).flatten().tolist(),
                "gradients": {
                    k: p.grad.numpy().copy() for k, p in trainer.model.named_parameters() if p.grad is not None
                },
            }
        )
    return found


def in_double(inputs: Inputs) -> Inputs:
    """Return what a model of 64-bit weights takes."""
    graphs = inputs.graphs.apply(lambda x: x.double() if x.is_floating_point() else x)
    second = None if inputs.second is None else inputs.second.double()
    return replace(inputs, images=inputs.images.double(), graphs=graphs, second=second)
