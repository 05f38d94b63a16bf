"""Train a model of transformers, unedited, with a parallel plan for every batch.

A small Llama or Qwen3 from a configuration, on the source of the Python standard library byte by byte. The same file runs
under both launchers, on any number of workers; a checkpoint of four workers goes on with two::

    evermesh launch --workers 4 docs/examples/own_model.py --model qwen3
    torchrun --nproc-per-node 4 docs/examples/own_model.py --model llama --tp 2

With ``--checkpoints DIRECTORY`` it saves every 10 steps, and goes on from the newest one when it is started again (which
``evermesh launch --max-restarts 3`` does by itself). Needs ``pip install 'evermesh[hf]'``.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import evermesh
from evermesh.runtime.data.stdlib import stdlib_files

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Text:
    """Files as documents of bytes: from a few to ``longest`` of them, the same for every rank."""

    def __init__(self, longest: int) -> None:
        files = [file.path.read_bytes() for file in stdlib_files()]
        self.documents = [
            torch.frombuffer(bytearray(text[:longest]), dtype=torch.uint8) for text in files if len(text) > 1
        ]

    def batch(self, step: int, num_tokens: int) -> list[torch.Tensor]:
        """The documents of a step: in a random order, whatever still fits into so many tokens."""
        batch: list[torch.Tensor] = []
        for number in np.random.default_rng(step).permutation(len(self.documents)):
            document = self.documents[number]
            if len(document) <= num_tokens:
                batch.append(document.long())
                num_tokens -= len(document)
        return batch


def main(arguments: argparse.Namespace) -> None:
    """Train."""
    layout = evermesh.Layout(tp=arguments.tp, capacity=arguments.capacity)
    layout = layout.fitted_to(int(os.environ.get("WORLD_SIZE", "1")))
    mesh = evermesh.start(layout)

    torch.manual_seed(0)
    config = AutoConfig.for_model(arguments.model, **SIZES)
    model = evermesh.parallelize(AutoModelForCausalLM.from_config(config), layout, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    first = 0
    if arguments.checkpoints and any(Path(arguments.checkpoints).glob("step-*")):
        first = model.load(arguments.checkpoints, optimizer)
    text = Text(longest=min(4096, layout.hdp * layout.capacity))
    for step in range(first + 1, arguments.steps + 1):
        documents = text.batch(step, arguments.batch_tokens)
        started_s = time.monotonic()
        loss = model.train_batch(documents)
        norm = model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        took_s = time.monotonic() - started_s
        if mesh.world.rank == 0 and model.plan is not None:
            rings = ", ".join(f"{count} on {ranks}" for ranks, count in model.plan.ring_sizes().items())
            each = [len(micro_batches) for micro_batches in model.plan.ranks]
            print(
                f"step {step:3} loss {loss:.4f} norm {norm:.3f} {model.plan.num_tokens / took_s:7,.0f} tokens/s "
                f"documents by ranks: {rings}; micro-batches: {each}",
                flush=True,
            )
        if arguments.checkpoints and (step % 10 == 0 or step == arguments.steps):
            model.save(arguments.checkpoints, step, optimizer)
    mesh.host.barrier("end")
    evermesh.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["llama", "qwen3"], default="qwen3")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree; the other ranks are hdp")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--capacity", type=int, default=1024, help="tokens of a micro-batch on one HDP rank")
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--checkpoints", help="directory; by default nothing is saved")
    main(parser.parse_args())
