"""--augment: every training sequence is read anew in every epoch, from a random strand and starting at a random base 0-5 (6-mer phase).

A fragment's reverse complement, and the fragment without its first bases, carry the same label; but cut into 6-mers, one per six
bases, they share no token with it. Neither the paper nor its code does this: it is off by default.
"""

import numpy as np
import torch

from taxa.data.dataset import padded_batch
from taxa.data.tokens import NTTokenizer

COMPLEMENT = bytes.maketrans(b"ACGTN", b"TGCAN")
PHASES = 6
VIEWS = 2 * PHASES  # a strand and a 6-mer phase


def view(bases, v):
    """View v in 0..11 of a sequence (bytes): from 6 on its reverse complement; without the first v % 6 bases. View 0 is the sequence."""
    strand = bases if v < PHASES else bases.translate(COMPLEMENT)[::-1]
    return strand[v % PHASES:]


class AugmentedSplit(torch.utils.data.Dataset):
    """The sequences of a split in the views of one epoch; batches of the same shapes as TokenSplit's."""

    def __init__(self, split, tokenizer, seed, epoch):
        """split: TokenSplit of the nt tokens, which spell the bases. tokenizer: the model's. seed and epoch alone decide the views."""
        self.split, self.tokenizer, self.nt = split, tokenizer, NTTokenizer()
        self.views = np.random.RandomState([seed, epoch, VIEWS]).randint(VIEWS, size=len(split))

    def __len__(self):
        return len(self.split)

    def __getitem__(self, indices):
        """A list of B numbers -> {"input_ids" (B, T) int64, "attention_mask" (B, T) int64, "labels" (B, R) int64}, padded right."""
        bases = [view(self.nt.decode(self.split.tokens(i)), self.views[i]) for i in indices]
        ids, counts = self.tokenizer.encode(b"".join(bases), [len(text) for text in bases])
        return padded_batch(np.split(ids, np.cumsum(counts)[:-1]), self.tokenizer.pad_token_id, self.split.labels[indices])
