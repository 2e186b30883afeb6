"""Components and contexts of a configuration, as ``fit`` makes them."""

from ddp_sgd.engine.components import Given, gather_components
from ddp_sgd.engine.rank_consistency import Identity
from ddp_sgd.engine.resume import plan_from
from ddp_sgd.engine.setup import build_context


def gather(config, **given):
    return gather_components(
        Given(**given), model=config.model, loss=config.loss, data=config.data, seed=config.seed
    )


def context_of(config, components, runtime, resume_point):
    settings = config.model_dump(mode="json")
    identity = Identity(
        run_id=resume_point.run_id, config=settings, loss=components.loss_name, marks={}
    )
    samples = len(components.train_set)
    plan = plan_from(config, resume_point.header, samples=samples, world_size=runtime.world_size)
    sections = {name: getattr(config, name) for name in ("optim", "parallel", "compute")}
    return build_context(components, plan, runtime, resume_point, identity, **sections)
