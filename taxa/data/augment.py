"""The views of a sequence: a strand, and the base at which it starts, 0-5 (6-mer phase).

--augment reads every training sequence anew in every epoch, in a random view. A fragment's reverse
complement, and the fragment without its first bases, carry the same label. But cut into 6-mers, one
per six bases, they share no token with it. Neither the paper nor its code does this: it is off by
default. --both-strands reads a sequence and its reverse complement.
"""

import numpy as np
import torch

from taxa.data.batches import labelled, padded
from taxa.data.grammar import reverse_complement
from taxa.data.tokens import NTTokenizer

PHASES = 6
VIEWS = 2 * PHASES  # a strand and a 6-mer phase


def view(bases, v):
    """View v in 0..11 of a sequence (bytes), without the first v % 6 bases of its strand.

    From 6 on the strand is the reverse complement. View 0 is the sequence itself.
    """
    strand = bases if v < PHASES else reverse_complement(bases)
    return strand[v % PHASES:]


class ViewedSplit(torch.utils.data.Dataset):
    """The sequences of a split, each in one of its views. Batches have the shapes of TokenSplit's.
    """

    def __init__(self, split, tokenizer, views):
        """split: TokenSplit of the nt tokens, which spell the bases. tokenizer: the model's.

        views: (N,) numbers in 0..11.
        """
        self.split = split
        self.tokenizer = tokenizer
        self.views = views
        self.nt = NTTokenizer()
        self.name = split.name
        self.labels = split.labels

    def __len__(self):
        return len(self.split)

    def __getitem__(self, indices):
        """A list of B numbers -> their batch, padded right.

        {"input_ids" (B, T) int64, "attention_mask" (B, T) int64, "labels" (B, R) int64}
        """
        bases = [view(self.nt.decode(self.split.tokens(i)), self.views[i]) for i in indices]
        ids, counts = self.tokenizer.encode(b"".join(bases), [len(text) for text in bases])
        rows = np.split(ids, np.cumsum(counts)[:-1])
        batch = padded(rows, self.tokenizer.pad_token_id)
        return labelled(batch, self.split.labels[indices])


def augmented(split, tokenizer, seed, epoch):
    """The split in random views, which seed and epoch alone decide: a ViewedSplit."""
    views = np.random.RandomState([seed, epoch, VIEWS]).randint(VIEWS, size=len(split))
    return ViewedSplit(split, tokenizer, views)


def other_strands(split, tokenizer):
    """The reverse complements of a split: a ViewedSplit."""
    return ViewedSplit(split, tokenizer, np.full(len(split), PHASES))
