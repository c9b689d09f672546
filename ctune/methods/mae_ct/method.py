"""MAE-CT (arXiv 2304.10520) as in mae_ct.md: up to three stages, `mae` first."""

from torch import Tensor, nn

from ctune.errors import ConfigError
from ctune.events import Warned
from ctune.methods.base import Program, RunContext, StagePlan
from ctune.methods.contrastive import grad_cache_warnings
from ctune.methods.mae_ct.advice import FeatureChange, advise, start_warnings
from ctune.methods.mae_ct.combined import combined_plan
from ctune.methods.mae_ct.config import HEAD, MaeCTConfig
from ctune.methods.mae_ct.stages import HeadStages
from ctune.methods.mae_stage import mae_plan
from ctune.nnclr_head import NNCLRHead
from ctune.schema import JsonObject
from ctune.seeding import seed_everything


def make_head(config: MaeCTConfig, context: RunContext) -> NNCLRHead:
    """Return the head on the run's device: that of the start model where the run continues it.

    Raises:
        ConfigError: there is none that was trained, and none may be started; it does not fit the
            config.
        EncoderError: ``model_damaged``: its file is.
    """
    seed_everything(context.seed, HEAD)
    sizes = config.head
    head = NNCLRHead(
        context.encoder.embed_dim,
        proj_hidden_dim=int(sizes.proj_hidden_dim),
        pred_hidden_dim=int(sizes.pred_hidden_dim),
        out_dim=int(sizes.out_dim),
        queue_size=int(sizes.queue_size),
    )
    if config.continues_head:
        trained = context.start_head(HEAD)
        if trained is not None:
            _load(head, trained)
            if not context.has_start_data:
                head.queue.forget_images()
        if not (head.is_trained or config.allow_random_head):
            raise ConfigError(
                "the model that the run starts from has no trained head to go on with",
                hint="add 'head_init' to stages, or set allow_random_head",
            )
    return head.to(context.device)


def _load(head: NNCLRHead, trained: dict[str, Tensor]) -> None:
    try:
        head.load_state_dict(trained)
    except RuntimeError as error:
        raise ConfigError(
            f"the head of the start model does not fit: {error}",
            hint="leave the values of the block head 'auto', or add 'head_init' to stages",
        ) from error


def build(config: MaeCTConfig, context: RunContext) -> Program:
    """Return the program: the stages that the config names.

    Raises:
        ConfigError: the encoder is none that a stage fits; as `make_head`.
        EncoderError: as `make_head`.
    """
    modules: dict[str, nn.Module] = {"encoder": context.encoder}
    num_images = len(context.train_labels)
    change = FeatureChange(num_images, context.encoder.embed_dim).to(context.device)
    plans: list[StagePlan] = []

    def add(planned: tuple[StagePlan, dict[str, nn.Module]]) -> None:
        plans.append(planned[0])
        modules.update(planned[1])

    if "mae" in config.stages:
        add(mae_plan(config.mae, context))
        if "contrastive_tuning" in config.stages:  # then the decoder does not fit what is exported
            modules["discarded_decoder"] = modules.pop("mae_decoder")
    if config.trains_head:
        modules[HEAD] = head = make_head(config, context)
        stages = HeadStages(config, context, head)
        if "combined" in config.stages:
            add(combined_plan(config.combined, context, head))
        if "head_init" in config.stages:
            add(stages.plan_head_init())
        if "contrastive_tuning" in config.stages:
            modules["feature_change"] = change
            add(stages.plan_tuning(change))

    def final_advice(before: JsonObject | None, after: JsonObject) -> list[Warned]:
        tuned = change.warnings(context) if "feature_change" in modules else []
        # A run that pre-trains has not scored the masked autoencoder that the head should better.
        return tuned if _pretrains(config) else advise(before, after) + tuned

    return Program(
        nn.ModuleDict(modules), plans, _start_warnings(config, context), advise=final_advice
    )


def _pretrains(config: MaeCTConfig) -> bool:
    return bool({"mae", "combined"} & {*config.stages})


def _start_warnings(config: MaeCTConfig, context: RunContext) -> list[Warned]:
    if not config.trains_head:
        return []
    found = start_warnings(
        encoder_is_mae=_pretrains(config) or context.encoder_is_mae,
        queue_size=int(config.head.queue_size),
        num_images=len(context.train_labels),
        temperatures={name: float(stage.temperature) for name, stage in config.head_stages.items()},
    )
    if config.grad_cache:
        found += grad_cache_warnings(context.encoder, micro_batch_size=config.micro_batch_size)
    return found
