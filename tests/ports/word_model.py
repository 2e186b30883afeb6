"""A recurrent word model with truncated backpropagation through time.

The text is laid in columns. A step reads the next words of every column, in order, and goes on with
the hidden state that the last step left. A rank writes down the state of its own columns; once the
step is taken, all ranks get those of all.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

COLUMNS, ROWS, WORDS, VOCABULARY, HIDDEN = 8, 4, 5, 11, 6
CONFIG = {
    "epochs": 2,
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "data": {
        "train": {"class_path": "ports.word_model.Text"},
        "eval": None,
        "order": "sequential",
        "input": ["words", "column", "row"],
        "target": "next",
        "batch_size": COLUMNS,
    },
    "optim": {"lr": 1.0, "reference_batch": COLUMNS, "momentum": 0.0, "clip_norm": 0.25},
    "schedule": {"name": "constant"},
}


class Text(Dataset):
    """Rows of words; a sample is one row of one column."""

    def __init__(self):
        drawn = torch.Generator().manual_seed(0)
        words = torch.randint(VOCABULARY, (COLUMNS, ROWS * WORDS + 1), generator=drawn)
        self.words = words.float().cumsum(1).long() % VOCABULARY

    def __len__(self):
        return ROWS * COLUMNS

    def __getitem__(self, index):
        row, column = divmod(index, COLUMNS)
        words = self.words[column, row * WORDS : (row + 1) * WORDS + 1]
        return {"words": words[:-1], "next": words[1:], "column": column, "row": row}


class WordModel(nn.Module):
    """Embedding, recurrent layer, scores of the next word."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.recurrent = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.scores = nn.Linear(HIDDEN, VOCABULARY)
        self.register_buffer("hidden", torch.zeros(COLUMNS, HIDDEN))
        self.register_buffer("reached", torch.zeros(COLUMNS, HIDDEN))

    def forward(self, words, column, row):
        """Return the scores of the next word, of shape (m, VOCABULARY, WORDS)."""
        hidden = self.hidden[column] * (row > 0)[:, None]
        outputs, last = self.recurrent(self.embedding(words), hidden[None])
        self.reached[column] = last[0].detach()
        return self.scores(outputs).transpose(1, 2)

    def after_step(self, step):
        """Keep the states that the step has reached, for the next one."""
        if dist.is_initialized():
            dist.all_reduce(self.reached)
        self.hidden.copy_(self.reached)
        self.reached.zero_()


build_model = WordModel


def by_hand(model, epochs):
    """Train as the script does, which forgets the state at the beginning of an epoch."""
    for epoch in epochs:
        hidden = torch.zeros(1, COLUMNS, HIDDEN)
        for batch in epoch:
            model.zero_grad()
            outputs, hidden = model.recurrent(model.embedding(batch["words"]), hidden.detach())
            scores = model.scores(outputs).transpose(1, 2)
            functional.cross_entropy(scores, batch["next"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-1.0)
    model.hidden.copy_(hidden[0])
