"""Runs OpenVLA's own PyTorch code on the example's checkpoints, and writes what it computes.

    tests/reference/make

calls this with a folder that has the code, `prismatic_hf/` and `deploy.py`, and gets the checkpoints,
and with the code's commit. The weights are bf16, as published; the reference runs them in f64, so that its own
rounding, which in f32 is as large as what is allowed to others, is not held against them.

Two things are changed for checkpoints that are small: the towers' widths and depths, which the code
takes from timm's names, are those of the weights; and the token that `predict_action` appends, 29871 in
Llama-2's vocabulary, is the same piece of the example's.
"""

import hashlib
import json
import logging
import platform
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock, patch

import json_numpy
import numpy as np
import timm
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForVision2Seq, AutoProcessor

WORK, COMMIT = Path(sys.argv[1]).resolve(), sys.argv[2]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(WORK))
sys.modules["draccus"] = MagicMock()  # reads the server's command line

import deploy  # noqa: E402
from prismatic_hf.configuration_prismatic import OpenVLAConfig  # noqa: E402
from prismatic_hf.modeling_prismatic import OpenVLAForActionPrediction  # noqa: E402
from prismatic_hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor  # noqa: E402

SPACE = 352  # the example's piece `▁`
PICTURES = HERE / "pictures"
PACKAGES = "fastapi json-numpy numpy peft pillow starlette timm tokenizers torch torchvision transformers"
V01 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: What action should the "
    "robot take to {}? ASSISTANT:"
)
PROMPTS = {"openvla": "In: What action should the robot take to {}?\nOut:", "v01": V01}
UNICODE = "Move  the Jalapeño to Straße №7 – наполовину, s'il te plaît 🍆"
SUITES = {
    # `wide` has rows of whole K-quant blocks.
    "openvla": (
        {"variant": "openvla", "size": "wide", "seed": 11, "shards": 1},
        [
            ("eggplant", "table.png", "put eggplant into pot", None),
            ("unicode", "table.png", UNICODE, "example_tabletop"),
            ("tall", "tall_rgba.png", "Slide the RED block onto the plate", None),
        ],
    ),
    "v01": (
        {"variant": "v01", "size": "tiny", "seed": 21, "shards": 3},
        [
            ("tabletop", "strip.png", "pick up the cup", "example_tabletop"),
            ("six_axes", "strip.png", "Slide the RED block onto the plate", "example_six_axes"),
            ("bimanual", "strip.png", UNICODE, "example_bimanual"),
        ],
    ),
    "lora": (
        {"variant": "v01", "size": "tiny", "seed": 21, "shards": 1},
        [("tabletop", "strip.png", "put eggplant into pot", "example_tabletop")],
    ),
}
INSTRUCTIONS = [
    "", " ", "  ", "pick up the cup", "Pick Up The CUP", "put the spoon on the towel.", "open the drawer!",
    "move 3 blocks 2.5cm left", "rotate by -45°", "grab object #7", "snake_case_and-kebab-case",
    "a/b\\c|d", "https://example.com/a?b=c&d=e", "tab\tseparated", "line\nbreak", "carriage\r\nreturn",
    "trailing space ", "  two leading", "two  inner   spaces and    four", "a", "?", "...", "\"quoted\" `tick`",
    "(parens) [brackets] {braces} <angle>", "naïve façade", "e\u0301 combining", "поднять красный кубик",
    "把红色方块放进碗里", "컵을 들어", "ارفع الكوب", "👩\u200d🚀🤖", "nbsp\u00a0here", "ideographic\u3000space",
    "ǅ titlecase İstanbul", "STRASSE ẞ", "ΑΣ final sigma ΟΔΟΣ", "\ufeffbom", "<s>", "a<s>b</s> c", "<unk> token",
    "<PAD>", "<0x41>", "▁already▁underscored", "out:", "x" * 40, "0.1 -0.2 3e-4", UNICODE,
]  # fmt: skip


def read(path):
    return json.loads(path.read_text())


def lines(value, indent=""):
    """JSON with one line per list of plain values."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {lines(item, inner)}" for key, item in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = [lines(item, inner) for item in value]
    else:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{right}"


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(lines(value) + "\n")


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def pictures(table):
    """Ways in which pictures differ: sides, modes, alpha."""
    random = np.random.RandomState(0)
    noise = lambda *shape: random.randint(0, 256, shape, dtype=np.uint8)
    picture, alpha = Image.open(table).convert("RGB"), Image.fromarray(noise(160, 90))
    tall = picture.rotate(90, expand=True).resize((90, 160), Image.BOX)
    made = {
        "table": picture,
        "tall_rgba": Image.merge("RGBA", [*tall.split(), alpha]),
        "strip": picture.crop((0, 90, 320, 193)).resize((100, 33), Image.BOX),
        "square": picture.crop((10, 5, 234, 229)),
        "odd": picture.crop((40, 8, 265, 231)),
        "line": Image.fromarray(noise(500, 3, 3)),
        "noise": Image.fromarray(noise(47, 31, 3)),
        "pixel": Image.fromarray(noise(1, 1, 3)),
        "grey": tall.convert("L"),
        "grey_alpha": Image.merge("LA", [tall.convert("L"), alpha]),
        "palette": tall.quantize(16),
    }
    PICTURES.mkdir(exist_ok=True)
    for name, image in made.items():
        image.save(PICTURES / f"{name}.png", optimize=True)
    return made


def preprocess(made):
    """Hashes of the planes of each picture, by each strategy, with the towers' exact statistics."""
    dinov2, siglip = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
    strategies = [
        ("resize-naive", True, [dinov2, siglip]),
        ("resize-crop", True, [dinov2, siglip]),
        ("letterbox", False, [siglip]),
    ]
    cases = []
    for name in made:
        for strategy, fused, towers in strategies:
            # A line of 3 × 500 pixels, by its shorter side, would be 37,333 long.
            if name == "line" and strategy != "resize-naive":
                continue
            n = len(towers)
            processor = PrismaticImageProcessor(
                fused, strategy, [(3, 224, 224)] * n, ["bicubic"] * n, *map(list, zip(*towers))
            )
            planes = processor(Image.open(PICTURES / f"{name}.png"), return_tensors="np")
            cases.append({
                "id": name,
                "strategy": strategy,
                "fused": fused,
                "input": f"pictures/{name}.png",
                "pixel_values_f32_sha256": sha256(planes["pixel_values"][0]),
            })
    write(HERE / "preprocess.json", {"cases": cases})


def small(folder):
    """timm's towers, in turn, with the sizes of a checkpoint's weights."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    create, towers = timm.create_model, iter(["featurizer", "fused_featurizer"])

    def create_model(*args, **kwargs):
        prefix = f"vision_backbone.{next(towers)}."
        dim = shapes[f"{prefix}patch_embed.proj.weight"][0]
        hidden = shapes[f"{prefix}blocks.0.mlp.fc1.weight"][0]
        depth = sum(name.startswith(prefix) and name.endswith("norm1.weight") for name in shapes)
        return create(*args, embed_dim=dim, depth=depth, mlp_ratio=hidden / dim, **kwargs)

    return create_model


def load(folder, dtype=torch.float64):
    """A checkpoint's model and processor, as the reference's `deploy.py` loads them, but for the type."""
    with patch("timm.create_model", small(folder)):
        model = AutoModelForVision2Seq.from_pretrained(folder, torch_dtype=dtype).eval()
    model.norm_stats = read(folder / "dataset_statistics.json")
    return model, AutoProcessor.from_pretrained(folder)


def adapted(folder, adapter):
    """A model with an adapter merged, which is written first: as `finetune.py` makes it, but untrained."""
    torch.manual_seed(0)
    model, _ = load(folder, torch.bfloat16)
    linear = LoraConfig(
        r=4, lora_alpha=2, lora_dropout=0.0, target_modules="all-linear", init_lora_weights="gaussian"
    )
    model = get_peft_model(model, linear)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5 * weight.shape[0] ** -0.5)
    model.save_pretrained(adapter)
    (adapter / "README.md").unlink()
    config = read(adapter / "adapter_config.json")
    config["base_model_name_or_path"] = "openvla/openvla-v01-7b"
    config["target_modules"].sort()
    write(adapter / "adapter_config.json", config)
    return PeftModel.from_pretrained(load(folder)[0], adapter).merge_and_unload()


def append_our_space():
    code = OpenVLAForActionPrediction.predict_action.__code__
    assert code.co_consts.count(29871) == 1
    constants = tuple(SPACE if constant == 29871 else constant for constant in code.co_consts)
    OpenVLAForActionPrediction.predict_action.__code__ = code.replace(co_consts=constants)


class Watched:
    """What the stages of one `predict_action` computed, and what `generate` was given and gave."""

    def __init__(self, model):
        self.vision, self.logits, self.model = {}, [], model
        backbone, names = model.vision_backbone, ["vit0_patch_features", "vit1_patch_features"]
        towers = [backbone.featurizer, getattr(backbone, "fused_featurizer", None)]
        stages = [*zip(names, towers), ("projector_output", model.projector)]
        self.hooks = [
            module.register_forward_hook(lambda _, __, out, name=name: self.see(name, out))
            for name, module in stages
            if module is not None
        ]
        last = lambda _, __, out: self.logits.append(out.logits[0, -1].float().numpy())
        self.hooks.append(model.language_model.register_forward_hook(last))

    def see(self, name, out):
        self.vision[name] = out[0].float().numpy()

    def act(self, **inputs):
        generate = self.model.generate

        def watched(input_ids, **kwargs):
            out = generate(input_ids, **kwargs)
            self.prompt, self.generated = input_ids[0].tolist(), out[0, input_ids.shape[1] :].tolist()
            return out

        self.model.generate = watched
        with torch.no_grad():
            action = self.model.predict_action(**inputs, do_sample=False)
        self.model.generate = generate
        for hook in self.hooks:
            hook.remove()
        return action


def suite(name, spec, cases, adapter=None):
    out, folder = HERE / name, WORK / name
    flags = [text for key, value in spec.items() for text in (f"--{key}", str(value))]
    subprocess.run(["cargo", "run", "-q", "-p", "openvla-example", "--", folder, *flags], check=True)
    folder /= "openvla-example"
    model, processor = load(folder)
    if adapter:
        model = adapted(folder, out / adapter)
    found = []
    out.mkdir(exist_ok=True)
    for id, picture, instruction, key in cases:
        prompt = PROMPTS[spec["variant"]].format(instruction.lower())
        inputs = processor(prompt, Image.open(PICTURES / picture).convert("RGB"))
        planes = sha256(inputs["pixel_values"][0].numpy())
        watched = Watched(model)
        action = watched.act(**inputs.to(torch.float64), unnorm_key=key)
        n, logits = len(action), np.stack(watched.logits)
        used = [*watched.prompt, *watched.generated][-n:]
        normalized = model.bin_centers[np.clip(model.vocab_size - np.array(used) - 1, 0, 254)]
        vision = Path(picture).with_suffix(".safetensors").name
        save_file(watched.vision, out / vision)
        save_file(
            {"logits_first": logits[0], "logits_action_range": logits[:, model.vocab_size - 256 :].copy()},
            out / f"{id}.safetensors",
        )
        top = np.sort(logits, 1)
        found.append({
            "id": id,
            "image": f"../pictures/{picture}",
            "instruction": instruction,
            "unnorm_key": key,
            "prompt_ids": watched.prompt,
            "generated_ids": watched.generated,
            "last_n_ids_used_by_reference": used,
            "normalized_action": normalized.tolist(),
            "action": action.tolist(),
            "top1_minus_top2": (top[:, -1] - top[:, -2]).tolist(),
            "pixel_values_f32_sha256": planes,
            "vision": vision,
            "tensors": f"{id}.safetensors",
        })
        print(name, id, watched.generated, "lead by", (top[:, -1] - top[:, -2]).min())
    files = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())
    }
    versions = {"openvla": COMMIT, "python": platform.python_version()}
    versions |= {package: version(package) for package in PACKAGES.split()}
    index = {"versions": versions, "example": spec, "checkpoint_sha256": files, "cases": found}
    write(out / "cases.json", index)
    return model, processor


def sent(model, ids):
    """What `predict_action` gives `generate` for these ids."""
    seen = []

    def generate(input_ids, **_):
        seen.extend(input_ids[0].tolist())
        return torch.full((1, 99), 0)

    model.generate = generate
    model.predict_action(torch.tensor([ids]), unnorm_key=next(iter(model.norm_stats)))
    del model.generate
    return seen


def prompts(loaded):
    cases = []
    for instruction in INSTRUCTIONS:
        case = {"instruction": instruction}
        for name, (model, processor) in loaded.items():
            prompt = PROMPTS[name].format(instruction.lower())
            ids = processor.tokenizer(prompt).input_ids
            case[name] = {"prompt": prompt, "ids": ids, "model_input_ids": sent(model, ids)}
        case["raw_ids_no_bos"] = processor.tokenizer(instruction, add_special_tokens=False).input_ids
        cases.append(case)
    write(HERE / "prompts.json", {"cases": cases})


def actions(model):
    """Bins, and motions of tokens in each data set, out of range ones among them."""
    end, random = model.vocab_size, np.random.RandomState(1)

    def act(tokens, key):
        model.generate = lambda *_, **__: torch.tensor([tokens])
        action = model.predict_action(torch.tensor([[1, SPACE]]), unnorm_key=key).tolist()
        del model.generate
        return action

    rows = []
    for key, data in model.norm_stats.items():
        n = len(data["action"]["q01"])
        edges = [0, 2, end - 257, end - 256, end - 255, end - 2, end - 1, end, end + 63]
        for tokens in [
            *(random.randint(end - 256, end, n).tolist() for _ in range(4)),
            *([edge] * n for edge in edges),
        ]:
            rows.append({"unnorm_key": key, "tokens": tokens, "action": act(tokens, key)})
    write(
        HERE / "actions.json",
        {
            "vocab_size_for_actions": end,
            "bin_centers": model.bin_centers.tolist(),
            "norm_stats": model.norm_stats,
            "unnormalize": rows,
        },
    )


def modules():
    """Names and shapes of the published models' tensors."""
    v01 = {"vision_backbone_id": "siglip-vit-so400m", "llm_backbone_id": "vicuna-v15-7b"}
    fused = {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure"}
    found, linspace = {}, partial(torch.linspace, device="cpu")  # timm takes numbers from it
    for name, backbones in [("openvla", fused), ("v01", v01)]:
        config = OpenVLAConfig(**backbones, text_config={"vocab_size": 32064, "pad_token_id": 32000})
        with torch.device("meta"), patch("torch.linspace", linspace):
            model = OpenVLAForActionPrediction(config)
        found[name] = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    write(HERE / "modules.json", found)


def wire():
    """What the reference's server answers, to good and bad requests, where the model gives `action`."""
    action = [-0.0125, 0.0239, -0.0156, -0.0468, 0.0441, 0.1224, 0.99607843137]
    server = object.__new__(deploy.OpenVLAServer)
    server.openvla_path, server.device = "openvla-7b", "cpu"
    server.vla, server.processor = MagicMock(), MagicMock()
    server.vla.predict_action.return_value = np.array(action)
    server.processor.return_value.to.return_value = {}
    app = FastAPI()
    app.post("/act")(server.predict_action)
    client = TestClient(app)
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    good = {"image": image, "instruction": "do something"}
    requests = {
        "plain": json_numpy.dumps(good),
        "with_key": json_numpy.dumps({**good, "unnorm_key": "bridge_orig"}),
        "double_encoded": json.dumps({"encoded": json_numpy.dumps({**good, "unnorm_key": None})}),
        "grey": json_numpy.dumps({**good, "image": image[:, :, 0]}),
        "no_instruction": json_numpy.dumps({"image": image}),
        "no_image": '{"instruction": "x", "state": NaN}',
        "image_as_object": '{"image": {}}',
        "image_as_list": json.dumps({"image": image.tolist(), "instruction": "x"}),
        "encoded_and_more": '{"encoded": "{}", "x": 1}',
        "byte_order_mark": "\ufeff{}",
        "not_json": "hello",
        "json_array": "[1,2]",
        "empty": "",
        "get": None,
    }
    cases = []
    for name, body in requests.items():
        if body is None:
            answer = client.get("/act")
        else:
            headers = {"content-type": "application/json"}
            answer = client.post("/act", content=body.encode(), headers=headers)
        cases.append({
            "name": name,
            "request_body": body,
            "status": answer.status_code,
            "response_body": answer.text,
        })
    write(HERE / "wire.json", {"action_returned": action, "cases": cases})


def main():
    torch.set_num_threads(1)
    logging.disable()  # of the errors that the server answers
    AutoConfig.register("openvla", OpenVLAConfig)
    AutoImageProcessor.register(OpenVLAConfig, PrismaticImageProcessor)
    AutoProcessor.register(OpenVLAConfig, PrismaticProcessor)
    AutoModelForVision2Seq.register(OpenVLAConfig, OpenVLAForActionPrediction)
    append_our_space()
    preprocess(pictures(HERE.parents[1] / "example/table.png"))
    loaded = {name: suite(name, *SUITES[name]) for name in ["openvla", "v01"]}
    suite("lora", *SUITES["lora"], "adapter")
    prompts(loaded)
    actions(loaded["v01"][0])
    modules()
    wire()


if __name__ == "__main__":
    main()
