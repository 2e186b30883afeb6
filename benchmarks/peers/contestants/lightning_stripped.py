"""Lightning's Trainer in its barebones mode, which is there to measure what the Trainer costs.

No logger, checkpoints, progress bar, summary of the model, or validation to try things out.

Source:
    https://lightning.ai/docs/pytorch/stable/common/trainer.html#barebones
"""

from benchmarks.peers.contestants.lightning_trainer import run

if __name__ == "__main__":
    run(barebones=True)
