"""mlx_lm.server as it is, with nothing of ours but the injected fault."""

import mlx_lm.server as server

from mlx_safe import testing

plans = testing.plan_from_environment()
load = server.ModelProvider.load


def loaded(self, *args, **kwargs):
    model, tokenizer = load(self, *args, **kwargs)
    testing.attach(model)
    return model, tokenizer


server.ModelProvider.load = loaded
server.main()
