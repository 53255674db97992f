"""Writes a trained miniature as a checkpoint folder, as Hugging Face has openvla-7b's."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import DINOV2, N_BIN, SIGLIP, OpenVla, Sizes

TIMM = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
COPIED = [
    "added_tokens.json", "dataset_statistics.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json",
]


def config(s, statistics):
    return {
        "arch_specifier": "no-align+fused-gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [s.image, s.image],
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": N_BIN,
        "norm_stats": statistics,
        "output_projector_states": False,
        "pad_to_multiple_of": s.padding,
        "pad_token_id": s.n_piece,
        "text_config": {
            "hidden_size": s.llama,
            "intermediate_size": s.llama_ff,
            "model_type": "llama",
            "num_attention_heads": s.llama_heads,
            "num_hidden_layers": s.llama_layers,
            "num_key_value_heads": s.llama_heads,
            "pad_token_id": s.n_piece,
            "torch_dtype": "bfloat16",
            "vocab_size": s.n_row,
        },
        "timm_model_ids": TIMM,
        "timm_override_act_layers": [None, None],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }


def preprocessor(s):
    towers = [DINOV2, SIGLIP]
    resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": [s.image, s.image]}
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, s.image, s.image]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": [mean for mean, _ in towers],
        "processor_class": "PrismaticProcessor",
        "stds": [std for _, std in towers],
        "tvf_crop_params": [{"output_size": [s.image, s.image]}] * 2,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [dict(inplace=False, mean=m, std=d) for m, d in towers],
        "tvf_resize_params": [resize] * 2,
        "use_fused_vision_backbone": True,
    }


def generation(s):
    return {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": s.n_piece,
        "transformers_version": "4.40.1",
    }


def write(out, model, sizes, data):
    """`data` is the folder that `tabletop record` wrote: tokenizer and statistics."""
    out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(data / name, out / name)
    statistics = json.loads((data / "dataset_statistics.json").read_text())
    files = {
        "config.json": config(sizes, statistics),
        "generation_config.json": generation(sizes),
        "preprocessor_config.json": preprocessor(sizes),
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    tensors = {name: x.to(torch.bfloat16).contiguous() for name, x in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="what train.py left")
    parser.add_argument("data", type=Path, help="the folder it was trained with")
    parser.add_argument("out", type=Path, help="the checkpoint's folder")
    args = parser.parse_args()
    sizes = Sizes()
    model = OpenVla(sizes)
    average = torch.load(args.state)["average"]
    model.load_state_dict({n[4:]: x for n, x in average.items() if n.startswith("vla.")})
    write(args.out, model, sizes, args.data)


if __name__ == "__main__":
    main()
