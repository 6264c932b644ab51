"""Choose by name which tensors of a layer are saved for the backward pass; the rest is computed again."""
import jax

from mistake import Mistake

POLICIES = {  # EasyLM's names
    'nothing_saveable': jax.checkpoint_policies.nothing_saveable,
    'checkpoint_dots': jax.checkpoint_policies.checkpoint_dots,
    'checkpoint_dots_with_no_batch_dims': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    'everything_saveable': jax.checkpoint_policies.everything_saveable,
}
SAVEABLE = {  # ours, 'save:q,k,v': only tensors of these names; elements a token and layer, on each mp device
    'attention_input': 'M',  # the gathered norm: not gathered again
    'q': 'HD/mp', 'k': 'KD/mp', 'v': 'KD/mp',  # heads, turned
    'o': 'HD/mp', 'statistics': '2 H/mp',  # of attention (log-sum-exp, float32): both, and its kernel runs once
    'middle': 'M/mp',  # h between attention and ffn: neither w_o's product nor its reduce-scatter again
    'ffn_input': 'M',
    'gate': 'F/mp', 'up': 'F/mp',
}


def rematerialized(function, policy: str):
    """Wrap `function` in jax.checkpoint under a named policy; '' saves all that its backward pass needs."""
    return jax.checkpoint(function, policy=remat_policy(policy), prevent_cse=False) if policy else function


def remat_policy(policy: str):
    """Look up a name of POLICIES, or 'save:NAME,NAME' with names of SAVEABLE, for jax.checkpoint.

    Raises Mistake that lists them.
    """
    kind, _, names = policy.partition(':')
    if kind == 'save' and set(names.split(',')) <= set(SAVEABLE):
        return jax.checkpoint_policies.save_only_these_names(*names.split(','))
    if policy not in POLICIES:
        raise Mistake(f'remat {policy=} is not known: one of {" ".join(POLICIES)}, or save: and some of '
                      f'{",".join(SAVEABLE)}')
    return POLICIES[policy]
