"""The mathematics of the methods, a file for each.

Every function takes log-probabilities (natural logs) and gives a [`PreferenceLoss`]; the training loss is
`losses.mean()`. Nothing here knows about models, tokenizers or trainers. Inputs of any float dtype are computed in
float32 (float64 stays float64), because sums of hundreds of log-probabilities do not fit into bfloat16.

    function        paper                                reward of a response
    `dpo_loss`      arXiv 2305.18290, eq. 7              beta * (lp - lp_ref)
    `dpo_sum_loss`  those of `dpo_variants`, by name     beta * (lp - lp_ref)
    `leanpo_loss`   arXiv 2506.05260                     beta * lp / tokens
    `rrpo_loss`     arXiv 2504.12083                     beta * sum over its phrases of (lp - lp_ref)
    `lpoi_loss`     arXiv 2505.21061                     beta * (lp - lp_ref), one per image
    `simpo_loss`    arXiv 2405.14734                     beta * lp / tokens
    `tdpo_loss`     arXiv 2404.11999                     beta * (lp - lp_ref + KL summed over its tokens)
    `ddpo_loss`     arXiv 2312.00849                     beta * weighted sum of (lp - lp_ref)
    `dpa_loss`      arXiv 2405.18654                     sum over its phrases of lp
    `mdpo_loss`     arXiv 2406.11839                     beta * (lp - lp_ref)
    `dpop_loss`     arXiv 2402.13228                     beta * (lp - lp_ref)
    `mpo_loss`      arXiv 2411.10442                     beta * (lp - lp_ref)
    `mmdpo_loss`    arXiv 2502.10391                     beta * (lp - lp_ref)
    `symmpo_loss`   arXiv 2506.11712                     beta * (lp - lp_ref)
"""

from trl_vpo.losses.common import PreferenceLoss as PreferenceLoss
from trl_vpo.losses.ddpo import ddpo_loss as ddpo_loss
from trl_vpo.losses.dpa import dpa_loss as dpa_loss
from trl_vpo.losses.dpo import dpo_loss as dpo_loss
from trl_vpo.losses.dpo_sum import dpo_sum_loss as dpo_sum_loss
from trl_vpo.losses.dpop import dpop_loss as dpop_loss
from trl_vpo.losses.leanpo import leanpo_loss as leanpo_loss
from trl_vpo.losses.lpoi import lpoi_loss as lpoi_loss
from trl_vpo.losses.mdpo import mdpo_loss as mdpo_loss
from trl_vpo.losses.mmdpo import mmdpo_loss as mmdpo_loss
from trl_vpo.losses.mpo import mpo_loss as mpo_loss
from trl_vpo.losses.rrpo import rrpo_loss as rrpo_loss
from trl_vpo.losses.simpo import simpo_loss as simpo_loss
from trl_vpo.losses.symmpo import symmpo_loss as symmpo_loss
from trl_vpo.losses.tdpo import tdpo_loss as tdpo_loss
