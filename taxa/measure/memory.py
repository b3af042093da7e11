"""Where the memory of a training step goes: every live tensor counted, by part, and the moment at which the sum is largest.

    parameters, gradients, optimizer state     what the names say
    embedding, attention, feed-forward, LayerNorm, adapters, heads, loss
                                               activations: tensors that the forward saves for the backward, by the module that saves them
    working                                    all other tensors: results not saved, the backward's own, the batch

A tensor counts as the bytes of its storage, once, however many views of it there are, from its birth until its storage is freed. A
saved tensor belongs to the innermost module that was running when autograd saved it, the first one when several save the same (the
normalised input of query, key and value, say); a saved parameter stays a parameter. What taxa/recompute.py holds for the modules inside
a recomputed() belongs to the module that calls it. What is computed inside a layer but in none of its
modules (the product of SwiGLU) is the feed-forward's. What a kernel allocates and frees inside itself is not seen.

Tests compare the sum's peak with the allocator's own, to 10%.
"""

import contextlib
import os
import weakref
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taxa.ia3 import IA3Linear
from taxa.lora import LoRALinear

ACTIVATIONS = ("embedding", "attention", "feed-forward", "LayerNorm", "adapters", "heads", "loss")
PARTS = ("parameters", "gradients", "optimizer state", *ACTIVATIONS, "working")


def activation_parts(model):
    """{module name: the part that its saved tensors belong to} of a TaxonClassifier."""
    parts = {}
    for name, module in model.named_modules():
        path = name.split(".")
        if isinstance(module, (LoRALinear, IA3Linear)) or parts.get(".".join(path[:-1])) == "adapters":
            parts[name] = "adapters"
        elif isinstance(module, nn.LayerNorm):
            parts[name] = "LayerNorm"
        elif path[0] != "backbone":  # the classifier itself pools
            parts[name] = "heads"
        elif "embeddings" in path:
            parts[name] = "embedding"
        elif "layer" in path and "attention" not in path:
            parts[name] = "feed-forward"
        else:  # the backbone and the encoder themselves only make what attention reads: masks, rotary tables, ALiBi
            parts[name] = "attention"
    return parts


class LiveBytes(TorchDispatchMode):
    """While it is entered: the bytes of live tensors of one device by part (.live), and a copy at their largest sum (.at_peak).

    .most holds each part's own largest value, .most_saved the largest sum of the activations.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.live, self.at_peak, self.most = Counter(), Counter(), Counter()
        self.peak = self.most_saved = 0
        self._parts = {}  # id of a storage's Python object, which lives as long as the storage -> its part

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor, "working")
        return result

    def count(self, tensor, part):
        """Count the tensor's storage under `part`; one that is counted already moves there only from "working"."""
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key, size, old = id(storage), storage.nbytes(), self._parts.get(id(storage))
        if old is None:
            weakref.finalize(storage, self._free, key, size).atexit = False
        elif old != "working" or part == "working":
            return
        else:
            self.live[old] -= size
        self._parts[key] = part
        self.live[part] += size
        self._look()

    def _free(self, key, size):
        self.live[self._parts.pop(key)] -= size

    def _look(self):
        total, saved = sum(self.live.values()), sum(self.live[part] for part in ACTIVATIONS)
        self.most |= self.live  # the larger of the two, part by part
        self.most_saved = max(self.most_saved, saved)
        if total > self.peak:
            self.peak, self.at_peak = total, self.live.copy()


def step_memory(model, optimizer, batch, step):
    """Memory of one training step by part, in bytes.

    step(): forward, backward, clip, optimizer step, gradients set to None. It must have run once before, so that the optimizer's state
    exists. batch: the tensors that step() reads. Returns {"peak", "parts": {part: bytes at that moment}, "most": {part: its own
    largest}, "saved": largest sum of the activations, "resident": what is there before and after the step}. The parts add up to the peak.
    """
    device = next(model.parameters()).device
    bytes_of = LiveBytes(device)
    parts, running, handles = activation_parts(model), [], []
    for parameter in model.parameters():
        bytes_of.count(parameter, "parameters")
        handles.append(parameter.register_post_accumulate_grad_hook(lambda p: bytes_of.count(p.grad, "gradients"))
                       if parameter.requires_grad else None)
    for tensor in (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)):
        bytes_of.count(tensor, "optimizer state")
    for tensor in (*batch, *model.buffers()):
        bytes_of.count(tensor, "working")
    resident = sum(bytes_of.live.values())
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, args, part=parts[name]: running.append(part)))
        handles.append(module.register_forward_hook(lambda module, args, output: running.pop() and None, always_call=True))

    def pack(tensor):
        bytes_of.count(tensor, running[-1] if running else "loss")
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with contextlib.ExitStack() as stack:
        for handle in filter(None, handles):
            stack.callback(handle.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        stack.enter_context(bytes_of)
        step()
    return {"peak": bytes_of.peak, "parts": {part: bytes_of.at_peak[part] for part in PARTS},
            "most": {part: bytes_of.most[part] for part in PARTS}, "saved": bytes_of.most_saved, "resident": resident}


def allocator_peak(device, resident, step):
    """The most bytes that torch's allocator itself had handed out at one time while step() ran.

    CUDA: max_memory_allocated. CPU: every allocation and release as the profiler records them, on top of the `resident` bytes that
    were there before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler of torch 2.13 writes lines of its own to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [(event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = resident
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        most = max(most, now)
    return most
