"""The torch library's side of a comparison: a script that reads commands and answers them, one at a time.

Run by path, in an interpreter that need not have lvlm_jax: nothing but torch, transformers, numpy and Pillow is used.
A command is a line of JSON on standard input, ``{"do": name, ...}``; an answer is a line on what standard output was at
the start (libraries that print go to standard error), ``{"ok": {...}}`` or ``{"error": text}``. Arrays travel in files.
Between two commands nothing runs, so that the two sides never compute at the same time.
"""

import json
import os
import sys
import time


class Side:
    """What the commands share: the device, the models that are loaded, and the arrays to feed them."""

    def __init__(self):
        import torch
        import transformers

        self.torch, self.hf = torch, transformers
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.runs = {}

    def hello(self):
        """Versions, device and threads."""
        torch = self.torch
        device = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": self.hf.__version__}
        return {"versions": versions, "platform": self.device, "device": device, "threads": torch.get_num_threads()}

    # -----------------------------------------------------------------------------------------------------------------
    # Models and arrays

    def model(self, folder, dtype="float32"):
        """A LLaVA of a folder on the device."""
        dtype = getattr(self.torch, dtype)
        return self.hf.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(self.device)

    def arrays(self, path):
        """The arrays of an ``.npz`` file on the device."""
        import numpy as np

        with np.load(path) as file:
            return {name: self.torch.from_numpy(file[name]).to(self.device) for name in file.files}

    def wait(self):
        """Until the device has done what it was given."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def train_start(self, name, folder, batch, frozen, optimizer, dtype, compiled):
        """Makes a training run: the parameters under the prefixes `frozen` stand still, AdamW moves the rest.

        dtype: of the products (autocast); the weights are float32. compiled: by torch.compile.
        """
        torch = self.torch
        model = self.model(folder).train()
        for path, weight in model.named_parameters():
            weight.requires_grad_(not path.startswith(tuple(frozen)))
        moved = [weight for weight in model.parameters() if weight.requires_grad]
        clip = optimizer.pop("clip")
        self.runs[name] = {
            "model": torch.compile(model) if compiled else model,
            "moved": moved,
            "clip": clip,
            "optimizer": torch.optim.AdamW(moved, **optimizer),
            "batch": self.arrays(batch),
            "dtype": getattr(torch, dtype),
        }
        if compiled:  # now, so that what cannot be compiled is known before the first round; no weight moves
            try:
                self.runs[name]["model"](**self.runs[name]["batch"]).loss.backward()
            except Exception:
                del self.runs[name]  # and its weights leave the device
                raise
        total = sum(weight.numel() for weight in model.parameters())
        return {"weights": total, "trained": sum(weight.numel() for weight in moved)}

    def train(self, name):
        """One step: seconds, loss."""
        run, torch = self.runs[name], self.torch
        self.wait()
        began = time.perf_counter()
        run["optimizer"].zero_grad(set_to_none=True)
        with torch.autocast(self.device, run["dtype"], enabled=run["dtype"] != torch.float32):
            loss = run["model"](**run["batch"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run["moved"], run["clip"])
        run["optimizer"].step()
        self.wait()
        return {"seconds": time.perf_counter() - began, "loss": float(loss.detach())}

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    def generate_start(self, name, folder, batch, dtype):
        """Holds a model and a batch of prompts."""
        run = {"model": self.model(folder, dtype).eval(), "batch": self.arrays(batch)}
        run["batch"]["pixel_values"] = run["batch"]["pixel_values"].to(getattr(self.torch, dtype))
        run["model"].generation_config.eos_token_id = None  # all rows run to their full length
        self.runs[name] = run
        return {}

    def logits(self, name, out):
        """Writes the logits behind each prompt's last token."""
        import numpy as np

        run = self.runs[name]
        with self.torch.inference_mode():
            scores = run["model"](**run["batch"], logits_to_keep=1).logits
        np.save(out, scores[:, -1].float().cpu().numpy())
        return {}

    def generate(self, name, new_tokens):
        """Greedy tokens: seconds to the first of each row, seconds from there to the last, and the tokens."""
        run, moments = self.runs[name], []

        def clock(tokens, scores):
            self.wait()
            moments.append(time.perf_counter())
            return scores

        self.wait()
        began = time.perf_counter()
        with self.torch.inference_mode():
            out = run["model"].generate(
                **run["batch"],
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                logits_processor=self.hf.LogitsProcessorList([clock]),
            )
        tokens = out[:, run["batch"]["input_ids"].shape[1] :].tolist()
        return {"first": moments[0] - began, "rest": moments[-1] - moments[0], "tokens": tokens}

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures and folders

    def pictures_start(self, folder):
        """The picture processors of a folder that this interpreter has: by Pillow, and by torchvision where it is."""
        import importlib.util

        with open(os.path.join(folder, "preprocessor_config.json"), encoding="utf-8") as file:
            kind = json.load(file)["image_processor_type"]
        names = {"Pillow": f"{kind}Pil"}
        if importlib.util.find_spec("torchvision"):
            names["torchvision"] = kind
        self.processors = {name: getattr(self.hf, kind).from_pretrained(folder) for name, kind in names.items()}
        return {"names": list(names)}

    def pictures(self, name, files, out=""):
        """Reads and prepares pictures on one core: seconds; the pixels go to the file `out` where one is given."""
        import numpy as np
        import PIL.Image

        kept, threads = [], self.torch.get_num_threads()
        self.torch.set_num_threads(1)
        began = time.perf_counter()
        for path in files:
            picture = PIL.Image.open(path).convert("RGB")
            pixels = self.processors[name](picture, return_tensors="pt")["pixel_values"]
            if out:
                kept.append(pixels[0].numpy())
        seconds = time.perf_counter() - began
        self.torch.set_num_threads(threads)
        if out:
            np.save(out, np.stack(kept))
        return {"seconds": seconds}

    def load(self, folder, dtype):
        """Reads a folder's weights: seconds until each has been read once, and the sum of the arrays' largest."""
        began = time.perf_counter()
        model = self.model(folder, dtype)
        total = sum(float(weight.detach().abs().max()) for weight in model.parameters())
        return {"seconds": time.perf_counter() - began, "sum": total}

    def stop(self, name):
        """Gives back what a run holds."""
        import gc

        self.runs.pop(name)
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
        return {}


def main():
    """Answers commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values):
        answers.write(json.dumps(values) + "\n")

    try:
        side = Side()
    except ImportError as error:
        answer(missing=str(error))
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(ok=getattr(side, request.pop("do"))(**request))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
