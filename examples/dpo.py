"""Align all weights of a chat model with preferences, with TRL's DPOTrainer, a reference model and HiFT.

Start it on all GPUs of the machine, or on one with `--num_gpus 1`:

    deepspeed examples/dpo.py --data rows.jsonl

Each line of rows.jsonl is
`{"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", ...}], "rejected": ...}`.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, DPOTrainer

import hift_ds

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder, or a name on the Hub")
parser.add_argument("--data", required=True, help="a JSON Lines file with columns prompt, chosen and rejected")
parser.add_argument("--output", default="dpo-output", help="the folder of checkpoints and of the trained model")
parser.add_argument("--local_rank", type=int, help="set by the launcher")
arguments = parser.parse_args()

rows = load_dataset("json", data_files=arguments.data, split="train")
trainer = DPOTrainer(
    model=arguments.model,  # TRL loads the reference model from the same place
    args=DPOConfig(
        output_dir=arguments.output,
        deepspeed=str(Path(__file__).with_name("deepspeed_zero2.json")),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-6,
        beta=0.1,
        bf16=is_torch_bf16_gpu_available(),
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=rows,
    callbacks=[hift_ds.HiFTCallback(layers_per_block=1)],  # the only line that HiFT adds: each step trains one block
)
trainer.train()
trainer.save_model()
