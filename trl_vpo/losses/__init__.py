"""The mathematics of the methods, a file for each.

Every function takes log-probabilities (natural logs) and gives a [`PreferenceLoss`]; the training loss is
`losses.mean()`. Nothing here knows about models, tokenizers or trainers. Inputs of any float dtype are computed in
float32 (float64 stays float64), because sums of hundreds of log-probabilities do not fit into bfloat16.

    function        paper                                reward of a response
    `dpo_loss`      arXiv 2305.18290, eq. 7              beta * (lp - lp_ref)
    `leanpo_loss`   arXiv 2506.05260                     beta * lp / tokens
    `rrpo_loss`     arXiv 2504.12083                     beta * sum over its phrases of (lp - lp_ref)
    `lpoi_loss`     arXiv 2505.21061                     beta * (lp - lp_ref), one per image
"""

from trl_vpo.losses.common import PreferenceLoss
from trl_vpo.losses.dpo import dpo_loss
from trl_vpo.losses.leanpo import leanpo_loss
from trl_vpo.losses.lpoi import lpoi_loss
from trl_vpo.losses.rrpo import rrpo_loss

__all__ = ["PreferenceLoss", "dpo_loss", "leanpo_loss", "lpoi_loss", "rrpo_loss"]
