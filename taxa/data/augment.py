"""The views of a sequence: a strand, and the base at which it starts, 0-5 (6-mer phase).

--augment reads every training sequence anew in every epoch, in a random view. A fragment's reverse complement, and the fragment without
its first bases, carry the same label; but cut into 6-mers, one per six bases, they share no token with it. Neither the paper nor its code
does this: it is off by default. --both-strands reads a sequence and its reverse complement.
"""

import numpy as np
import torch

from taxa.data.batches import labelled, padded
from taxa.data.grammar import reverse_complement
from taxa.data.tokens import NTTokenizer

PHASES = 6
VIEWS = 2 * PHASES  # a strand and a 6-mer phase


def view(bases, v):
    """View v in 0..11 of a sequence (bytes): from 6 on its reverse complement; without the first v % 6 bases. View 0 is the sequence."""
    strand = bases if v < PHASES else reverse_complement(bases)
    return strand[v % PHASES:]


class ViewedSplit(torch.utils.data.Dataset):
    """The sequences of a split, each in one of its views; batches of the same shapes as TokenSplit's."""

    def __init__(self, split, tokenizer, views):
        """split: TokenSplit of the nt tokens, which spell the bases. tokenizer: the model's. views: (N,) numbers in 0..11."""
        self.split, self.tokenizer, self.views, self.nt = split, tokenizer, views, NTTokenizer()
        self.name, self.labels = split.name, split.labels

    def __len__(self):
        return len(self.split)

    def __getitem__(self, indices):
        """A list of B numbers -> {"input_ids" (B, T) int64, "attention_mask" (B, T) int64, "labels" (B, R) int64}, padded right."""
        bases = [view(self.nt.decode(self.split.tokens(i)), self.views[i]) for i in indices]
        ids, counts = self.tokenizer.encode(b"".join(bases), [len(text) for text in bases])
        batch = padded(np.split(ids, np.cumsum(counts)[:-1]), self.tokenizer.pad_token_id)
        return labelled(batch, self.split.labels[indices])


def augmented(split, tokenizer, seed, epoch):
    """The split in random views, which seed and epoch alone decide: a ViewedSplit."""
    return ViewedSplit(split, tokenizer, np.random.RandomState([seed, epoch, VIEWS]).randint(VIEWS, size=len(split)))


def other_strands(split, tokenizer):
    """The reverse complements of a split: a ViewedSplit."""
    return ViewedSplit(split, tokenizer, np.full(len(split), PHASES))
