"""Fine-tune all weights of a causal language model with a training loop on accelerate and HiFT.

Start it on one GPU, or on several with another `--num_processes`:

    accelerate launch --config_file examples/accelerate_zero2.yaml --num_processes 1 examples/accelerate_loop.py \
        --data rows.jsonl

Each line of rows.jsonl is `{"text": "..."}`. With `--resume accelerate-output/step_100`, training continues there.
"""

import argparse

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    get_cosine_schedule_with_warmup,
)

import hift_ds

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a folder, or a name on the Hub")
parser.add_argument("--data", required=True, help="a JSON Lines file with a column text")
parser.add_argument("--output", default="accelerate-output", help="the folder of checkpoints and of the trained model")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--save_every", type=int, default=100, help="optimizer steps between two checkpoints")
parser.add_argument("--resume", help="the folder of the checkpoint to continue from")
arguments = parser.parse_args()

set_seed(0)
accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(arguments.model)
rows = load_dataset("json", data_files=arguments.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=rows.column_names)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collator)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
accumulation = accelerator.deepspeed_plugin.get_value("gradient_accumulation_steps")
ticks = arguments.epochs * len(loader) // accumulation  # accelerate advances the schedule once per step and process
schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=ticks // 20, num_training_steps=ticks)

with hift_ds.enabled(layers_per_block=1):  # the only line that HiFT adds: each step trains one block
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    done = 0  # micro-batches
    if arguments.resume:
        accelerator.load_state(arguments.resume)
        done = int(arguments.resume.rstrip("/").rsplit("_", 1)[1]) * accumulation
    model.train()
    for epoch in range(done // len(loader), arguments.epochs):
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done % len(loader)):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)  # DeepSpeed clips, by its own setting
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            done += 1
            if accelerator.sync_gradients:
                step = model.global_steps
                accelerator.print(f"step {step}: loss {loss.item():.4f}, norm {norm:.4f}, {model.log_values()}")
                if step % arguments.save_every == 0:
                    accelerator.save_state(f"{arguments.output}/step_{step}")
accelerator.unwrap_model(model).save_pretrained(
    arguments.output,
    is_main_process=accelerator.is_main_process,
    save_function=accelerator.save,
    state_dict=accelerator.get_state_dict(model),
)
if accelerator.is_main_process:
    tokenizer.save_pretrained(arguments.output)
