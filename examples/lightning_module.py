"""Fine-tune all weights of a causal language model with Lightning's DeepSpeed strategy and HiFT.

Lightning starts a process for each GPU by itself:

    python examples/lightning_module.py --data rows.jsonl

Each line of rows.jsonl is `{"text": "..."}`. With `--resume lightning-output/step=100.ckpt`, training continues there.
"""

import argparse

import lightning
import torch
from datasets import load_dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    get_cosine_schedule_with_warmup,
)

import hift_ds


class LanguageModel(lightning.LightningModule):
    def __init__(self, name: str):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name).train()

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_):
        self.log_dict(self.trainer.strategy.deepspeed_engine.log_values())  # learning rate, block and cycle

    def validation_step(self, batch, index):
        self.log("held_out_loss", self.model(**batch).loss, prog_bar=True, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches
        schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a folder, or a name on the Hub")
parser.add_argument("--data", required=True, help="a JSON Lines file with a column text")
parser.add_argument("--output", default="lightning-output", help="the folder of checkpoints and of the trained model")
parser.add_argument("--resume", help="the folder of the checkpoint to continue from")
arguments = parser.parse_args()

lightning.seed_everything(0)
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = load_dataset("json", data_files=arguments.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=rows.column_names)
rows = rows.train_test_split(test_size=0.1, seed=0)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
training = torch.utils.data.DataLoader(rows["train"], batch_size=4, shuffle=True, drop_last=True, collate_fn=collator)
held_out = torch.utils.data.DataLoader(rows["test"], batch_size=4, collate_fn=collator)
module = LanguageModel(arguments.model)
trainer = lightning.Trainer(
    max_epochs=3,
    strategy="deepspeed_stage_2",
    precision="bf16-mixed",
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    log_every_n_steps=1,
    default_root_dir=arguments.output,
    callbacks=[ModelCheckpoint(arguments.output, "{step}", every_n_train_steps=100, save_top_k=-1)],
)
with hift_ds.enabled(layers_per_block=1):  # the only line that HiFT adds: each step trains one block
    trainer.fit(module, training, held_out, ckpt_path=arguments.resume)
trainer.test(module, held_out)
if trainer.is_global_zero:
    module.model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
