"""Fine-tune all weights of a causal language model with transformers' Trainer and HiFT.

Start it on all GPUs of the machine, or on one with `--num_gpus 1`:

    deepspeed examples/trainer.py --data rows.jsonl

`torchrun --nproc_per_node 1 examples/trainer.py ...` works as well. Each line of rows.jsonl is `{"text": "..."}`.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from transformers.utils import is_torch_bf16_gpu_available

import hift_ds

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a folder, or a name on the Hub")
parser.add_argument("--data", required=True, help="a JSON Lines file with a column text")
parser.add_argument("--output", default="trainer-output", help="the folder of checkpoints and of the trained model")
parser.add_argument("--local_rank", type=int, help="set by the launcher")
arguments = parser.parse_args()

training = TrainingArguments(
    output_dir=arguments.output,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    num_train_epochs=3,
    logging_steps=1,
    bf16=is_torch_bf16_gpu_available(),
    deepspeed=str(Path(__file__).with_name("deepspeed_zero2.json")),
    report_to="none",
)
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(arguments.model)
rows = load_dataset("json", data_files=arguments.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=rows.column_names)
trainer = Trainer(
    model=model,
    args=training,
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
with hift_ds.enabled(layers_per_block=1):  # the only line that HiFT adds: each step trains one block
    trainer.train()
trainer.save_model()
