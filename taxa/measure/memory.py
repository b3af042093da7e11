"""Where the memory of a training step goes: every live tensor, by part, when the sum is largest.

    parameters, gradients, optimizer state
        what the names say
    embedding, attention, feed-forward, LayerNorm, adapters, heads, loss
        activations: tensors that the forward saves for the backward, by the module that saves them
    checkpointed
        what --activation-checkpointing keeps of a layer instead: its input, and what it saves of it
    working
        all other tensors: results not saved, the backward's own, what it computes again, the batch

A tensor counts as the bytes of its storage, once, however many views of it there are, from its
birth until its storage is freed. A saved tensor belongs to the innermost module that was running
when autograd saved it. Where several save the same (the normalised input of query, key and value,
say) it is the first one. A saved parameter stays a parameter. What is computed inside a layer but
in none of its modules (the product of SwiGLU) is the feed-forward's. What a kernel allocates and
frees inside itself is not seen.

Tests compare the sum's peak with the allocator's own, to 10%.
"""

import contextlib
import gc
import itertools
import os
import weakref
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = (
    "embedding",
    "attention",
    "feed-forward",
    "LayerNorm",
    "adapters",
    "heads",
    "loss",
    "checkpointed",
)
PARTS = ("parameters", "gradients", "optimizer state", *ACTIVATIONS, "working")


def activation_parts(model):
    """{module name: the part that its saved tensors belong to} of a TaxonClassifier."""
    parts = {}
    for name, module in model.named_modules():
        path = name.split(".")
        above = parts.get(".".join(path[:-1]))
        if hasattr(module, "adapter_parameters") or above == "adapters":
            parts[name] = "adapters"
        elif isinstance(module, nn.LayerNorm):
            parts[name] = "LayerNorm"
        elif path[0] != "backbone":  # the classifier itself pools
            parts[name] = "heads"
        elif "embeddings" in path:
            parts[name] = "embedding"
        elif "layer" in path and "attention" not in path:
            parts[name] = "feed-forward"
        else:
            # the backbone and the encoder themselves only make what attention reads: masks,
            # rotary tables, ALiBi
            parts[name] = "attention"
    return parts


class LiveBytes(TorchDispatchMode):
    """While it is entered, it counts the bytes of live tensors of one device by part.

    .live holds them now, .at_peak when their sum was largest. .most holds each part's own largest
    value, .most_saved the largest sum of the activations.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.live = Counter()
        self.at_peak = Counter()
        self.most = Counter()
        self.peak = 0
        self.most_saved = 0
        # id of a storage's Python object, which lives as long as it -> (its part, its bytes)
        self._storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.count(tensor, "working")
        return result

    def count(self, tensor, part):
        """Count the tensor's storage under `part`.

        One that is counted already moves there only from "working".
        """
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        size = storage.nbytes()
        if key in self._storages:
            self._move(key, part)
        else:
            weakref.finalize(storage, self._free, key).atexit = False
            self._storages[key] = (part, size)
            self.live[part] += size
        self._look()

    def alive(self):
        """The ids of the storages that are alive."""
        return set(self._storages)

    def count_since(self, before, part, but):
        """Count under `part` what was born after alive() gave `before`, and lives.

        The tensors `but` are left out.
        """
        left_out = {id(tensor.untyped_storage()) for tensor in but}
        for key in self.alive() - before - left_out:
            self._move(key, part)
        self._look()

    def _move(self, key, part):
        old, size = self._storages[key]
        if old == "working":
            self.live[old] -= size
            self.live[part] += size
            self._storages[key] = (part, size)

    def _free(self, key):
        part, size = self._storages.pop(key)
        self.live[part] -= size

    def _look(self):
        total = sum(self.live.values())
        saved = sum(self.live[part] for part in ACTIVATIONS)
        self.most |= self.live  # the larger of the two, part by part
        self.most_saved = max(self.most_saved, saved)
        if total > self.peak:
            self.peak, self.at_peak = total, self.live.copy()


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def checkpointed(layer, bytes_of):
    """Hooks that count as "checkpointed" what a layer was given, and what its forward made and left
    alive, its output apart.
    """
    before = []

    def enter(module, args):
        for tensor in tensors_in(args):
            bytes_of.count(tensor, "checkpointed")
        before.append(bytes_of.alive())

    def leave(module, args, output):
        bytes_of.count_since(before.pop(), "checkpointed", but=tensors_in(output))

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def step_memory(model, optimizer, batch, step):
    """Memory of one training step by part, in bytes.

    step(): forward, backward, clip, optimizer step, gradients set to None. It must have run once
    before, so that the optimizer's state exists. batch: the tensors that step() reads. Returns
    {"peak", "parts": {part: bytes at that moment}, "most": {part: its own largest}, "saved":
    largest sum of the activations, "resident": what is there before and after the step}. The parts
    add up to the peak.
    """
    device = next(model.parameters()).device
    bytes_of = LiveBytes(device)
    parts = activation_parts(model)
    running = []
    handles = []

    def count_gradient(parameter):
        bytes_of.count(parameter.grad, "gradients")

    for parameter in model.parameters():
        bytes_of.count(parameter, "parameters")
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(count_gradient))
    for state in optimizer.state.values():
        for tensor in tensors_in(state):
            bytes_of.count(tensor, "optimizer state")
    for tensor in (*batch, *model.buffers()):
        bytes_of.count(tensor, "working")
    resident = sum(bytes_of.live.values())


    def leave(module, args, output):
        running.pop()

    for name, module in model.named_modules():

        def enter(module, args, part=parts[name]):
            running.append(part)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
        # put there by checkpoint_layers(): pack() below sees nothing of what autograd saves in
        # this layer
        if "forward" in vars(module):
            handles += checkpointed(module, bytes_of)

    def pack(tensor):
        bytes_of.count(tensor, running[-1] if running else "loss")
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        stack.enter_context(hooks)
        stack.enter_context(bytes_of)
        step()
    return {
        "peak": bytes_of.peak,
        "parts": {part: bytes_of.at_peak[part] for part in PARTS},
        "most": {part: bytes_of.most[part] for part in PARTS},
        "saved": bytes_of.most_saved,
        "resident": resident,
    }


def allocator_peak(device, resident, step):
    """The most bytes that torch's allocator itself had handed out at one time while step() ran.

    CUDA: max_memory_allocated. CPU: every allocation and release as the profiler records them, on
    top of the `resident` bytes that were there before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    _, changes = profiled(step)
    return resident + max(itertools.accumulate(changes, initial=0))


def account(device, model, optimizer, batch, step):
    """step_memory(), and under "allocator_peak" the allocator's own peak in another such step."""
    found = step_memory(model, optimizer, batch, step)
    return {**found, "allocator_peak": allocator_peak(device, found["resident"], step)}


def table(accounts):
    """MB by part at the moment of the peak as text, a column for each account.

    accounts: {label: account()}.
    """
    width = 2 + max(10, *map(len, accounts))
    found = list(accounts.values())
    rows = {part: [account["parts"][part] for account in found] for part in PARTS}
    rows["sum"] = [account["peak"] for account in found]
    rows["allocator's peak"] = [account["allocator_peak"] for account in found]
    rows["saved, at most"] = [account["saved"] for account in found]
    lines = [f"{'MB at the peak':<18}" + "".join(f"{label:>{width}}" for label in accounts)]
    for name, values in rows.items():
        lines.append(f"{name:<18}" + "".join(f"{value / 1e6:{width}.1f}" for value in values))
    return "\n".join(lines)


def bytes_kept(device, forward):
    """Bytes that torch's allocator has handed out and not got back when forward() returns and its
    result is held: what it keeps.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        _held = forward()  # and with it the graph
        return torch.cuda.memory_allocated(device) - before
    _held, changes = profiled(forward)
    return sum(changes)


def profiled(work):
    """work() on the CPU.

    Returns its result, and the bytes of every allocation and (negative) release in their order.
    """
    gc.collect()  # what is found to be garbage later would count as released by this work
    # else the profiler of torch 2.13 writes lines of its own to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    on_cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=on_cpu, profile_memory=True) as profile:
        result = work()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return result, [event.nbytes() for event in changes]
