"""A training step as train.py takes it, for what measures one: model, optimizer, batch, step."""

import torch

from taxa.backbones import load_backbone
from taxa.model import TaxonClassifier, sequence_losses
from taxa.runtime.precision import autocast
from taxa.strategies import inject_adapters, train_only, trainable_names
from taxa.training.activation_checkpointing import checkpoint_layers
from taxa.training.optim import adamw


def build(model, settings, num_classes, device, lr, mode="none", weights=None):
    """(classifier in train mode, optimizer), made as train.py makes them, from random weights:
    memory and time do not depend on them.

    model: a name in the table or a row; settings: of settings_from_flags(); mode: of
    --activation-checkpointing; weights: a folder to take the sizes from.
    """
    torch.manual_seed(0)
    classifier = TaxonClassifier(load_backbone(model, weights, pretrained=False), num_classes)
    inject_adapters(classifier, settings)
    train_only(classifier, trainable_names(classifier, settings))
    checkpoint_layers(classifier.backbone, mode)
    classifier.to(device).train()
    return classifier, adamw(classifier, lr)


def random_batch(vocab_size, num_classes, batch_size, tokens, device):
    """input_ids (B, T) without padding, attention_mask (B, T), labels (B, R).

    num_classes: a number per rank.
    """
    ids = torch.randint(5, vocab_size, (batch_size, tokens), device=device)
    labels = [torch.randint(0, classes, (batch_size,), device=device) for classes in num_classes]
    return ids, torch.ones_like(ids), torch.stack(labels, dim=1)


def batch_loss(model, batch, precision="fp32"):
    """The mean loss of a batch, with its graph."""
    input_ids, attention_mask, labels = batch
    with autocast(input_ids.device, precision):
        logits = model(input_ids, attention_mask)
    return sequence_losses(logits, labels).sum() / len(labels)


def training_step(model, optimizer, batch, precision="fp32"):
    """Forward, loss, backward, clip, optimizer step: one step of train.py on one process."""
    batch_loss(model, batch, precision).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def synchronize(device):
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
