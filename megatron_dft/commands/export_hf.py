"""`megatron-dft export`: a torch_dist checkpoint, saved at any layout, as a Hugging Face model."""

import argparse
from pathlib import Path
from typing import Any

from megatron_dft.commands.conversion import add_source_arguments, bar, compare_logits, quiet
from megatron_dft.data.end_tokens import probe_end_tokens
from megatron_dft.data.tokenizer import encoder_spec, load_tokenizer
from megatron_dft.flags.output import check_base_model
from megatron_dft.hf import bridge, companions
from megatron_dft.hf.source import HFCheckpoint, open_checkpoint
from megatron_dft.storage.dtypes import WORDS, dtype_word
from megatron_dft.storage.lock import held

SUMMARY = "torch_dist checkpoint -> Hugging Face directory, on CPU, without holding the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="what was given to Megatron's --save")
    parser.add_argument("out", type=Path, help="Hugging Face directory to write")
    parser.add_argument(
        "--hf-model",
        help="base model: config.json, tokenizer and tensor names come from it; the default is "
        "what the checkpoint was trained from",
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--dtype",
        type=dtype_word,
        choices=tuple(WORDS),
        help="of all tensors; default: as in the base model",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja file that the answers were trained with; default: what the checkpoint keeps of "
        "its run, else the base model's",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare Megatron's logits with those of the written model in transformers (holds "
        "the model twice)",
    )
    parser.add_argument(
        "--hf-base-model",
        metavar="ORG/NAME",
        help="hub name of the base for the model card, where it is a directory",
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="upload OUT as the hub model NAME")


def run(args: argparse.Namespace) -> int:
    quiet()
    with held("OUT", args.out, beside=True):
        return _export(args)


def _export(args: argparse.Namespace) -> int:
    from megatron_dft.hf.card import model_card
    from megatron_dft.hf.convert_export import export_checkpoint, find_iteration, training_args

    check_base_model(args.hf_base_model)
    source = find_iteration(args.checkpoint)
    trained = training_args(source)
    name = args.hf_model or getattr(trained, "hf_model", None)
    if name is None:
        raise ValueError(
            f"--hf-model is needed: {source} does not say which Hugging Face model it was made of"
        )
    revision = args.hf_revision
    if args.hf_model is None and revision is None:
        revision = getattr(trained, "hf_revision", None)
    base = open_checkpoint(name, revision, args.trust_remote_code)
    base_model = args.hf_base_model or getattr(trained, "hf_base_model", None)
    card = model_card(
        base,
        objective=_objective(trained),
        parameters=_settings(trained),
        base_model=base_model,
    )
    companions.check(base)
    chat = _trained_chat(args, trained, base)
    if bridge.uses_bridge(base, args.hf_bridge):
        return _through_bridge(args, base, card, chat)
    with bar("export") as progress:
        out = export_checkpoint(
            source,
            base,
            args.out,
            dtype=WORDS[args.dtype] if args.dtype else None,
            overwrite=args.overwrite,
            card=card,
            chat=chat,
            progress=progress,
        )
    print(f"written: {out}")
    if args.verify:
        compare_logits(open_checkpoint(out), source)
    if args.push_to_hub:
        push(out, args.push_to_hub)
    return 0


def _trained_chat(
    args: argparse.Namespace, trained: Any, base: HFCheckpoint
) -> companions.TrainedChat | None:
    """From the run's own record; for older checkpoints, and with --chat-template, from a probe."""
    kept = getattr(trained, "dft_trained_chat", None)
    if kept is not None and args.chat_template is None:
        return companions.TrainedChat(kept["templates"], tuple(kept["end_tokens"]))
    if args.chat_template is None and getattr(trained, "loss", None) is None:
        return None  # nothing was trained
    file = args.chat_template or getattr(trained, "chat_template", None)
    tokenizer = load_tokenizer(base.path, file, trust_remote_code=args.trust_remote_code)
    spec = encoder_spec(tokenizer)
    ends = probe_end_tokens(spec) if kept is None else tuple(kept["end_tokens"])
    return companions.TrainedChat(spec.templates if file else None, ends)


def _through_bridge(
    args: argparse.Namespace,
    base: HFCheckpoint,
    card: str,
    chat: companions.TrainedChat | None,
) -> int:
    for flag, given in (("--dtype", args.dtype), ("--verify", args.verify)):
        if given:
            raise ValueError(f"{flag}: not with megatron-bridge, which does its own; drop it")
    out = bridge.export_checkpoint(
        args.checkpoint,
        base,
        args.out,
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
        card=card,
        chat=chat,
    )
    print(f"written by megatron-bridge: {out}")
    if args.push_to_hub:
        push(out, args.push_to_hub)
    return 0


def _objective(trained: Any) -> str:
    return getattr(trained, "loss", None) or "none (imported weights)"


def _settings(trained: Any) -> dict[str, Any]:
    names = ("lr", "train_iters", "global_batch_size", "seq_length", "seed", "weight_decay")
    found = {n: getattr(trained, n, None) for n in names}
    return {n: v for n, v in found.items() if v is not None}


def push(directory: Path, name: str) -> None:
    """Upload a finished export; the token is the one huggingface_hub finds."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=directory)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--push-to-hub {name}: {type(error).__name__}: {reason}. The export itself is whole: "
            f"{directory}"
        ) from None
    print(f"uploaded: {commit.commit_url}")
