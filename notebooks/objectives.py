"""simpo.py with eleven more objectives: SFT, the rest of the paper's Table 3, three near SimPO.

    python notebooks/objectives.py --loss kto --beta 0.1 --model M --dataset D
    torchrun --nproc_per_node=8 notebooks/objectives.py --loss kto --model M --dataset D

Those of Table 3 are as printed there; beside each stand its paper and the values that were tried.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # simpo.py is in the folder above

import simpo


def sft(chosen, rejected):  # the stage before; it learns from the chosen answers alone
    return -chosen.avg_logp, chosen.avg_logp, rejected.avg_logp


def ipo(chosen, rejected, *, tau=0.1):  # arXiv:2310.12036; tau 0.01, 0.1, 0.5, 1.0
    chosen_logratios = chosen.logp - chosen.ref_logp  # sums, as printed; other code has averages
    rejected_logratios = rejected.logp - rejected.ref_logp
    losses = (chosen_logratios - rejected_logratios - 1 / (2 * tau)) ** 2
    return losses, tau * chosen_logratios, tau * rejected_logratios


def orpo(chosen, rejected, *, lambda_=0.1):  # arXiv:2403.07691; lambda 0.1, 0.5, 1.0, 2.0
    # The log odds of p = exp(avg_logp) are avg_logp - log(1 - p). Where p is almost 1, 1 - exp(x)
    # loses all digits, and -expm1(x) none. The clamp keeps log(0) out, where p is 1.
    chosen_log_not_p = torch.log(-torch.expm1(chosen.avg_logp.clamp(max=-1e-9)))
    rejected_log_not_p = torch.log(-torch.expm1(rejected.avg_logp.clamp(max=-1e-9)))
    chosen_log_odds = chosen.avg_logp - chosen_log_not_p
    rejected_log_odds = rejected.avg_logp - rejected_log_not_p
    losses = -chosen.avg_logp - lambda_ * F.logsigmoid(chosen_log_odds - rejected_log_odds)
    return losses, chosen.avg_logp, rejected.avg_logp


def kto(chosen, rejected, *, beta=0.1):  # arXiv:2402.01306; beta 0.01, 0.05, 0.1
    chosen_rewards = beta * (chosen.logp - chosen.ref_logp)
    rejected_rewards = beta * (rejected.logp - rejected.ref_logp)
    # z stands for beta times the divergence of the policy from the reference. This is an estimate:
    # the mean reward of the answers of one micro-batch, which are not the policy's own.
    z = torch.cat([chosen_rewards, rejected_rewards]).mean().clamp(min=0).detach()
    losses = -torch.sigmoid(chosen_rewards - z) - torch.sigmoid(z - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


def cpo(chosen, rejected, *, beta=0.1, lambda_=1.0):  # arXiv:2401.08417; beta 0.01, 0.05, 0.1
    chosen_rewards = beta * chosen.logp
    rejected_rewards = beta * rejected.logp
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards) - lambda_ * chosen.logp
    return losses, chosen_rewards, rejected_rewards


def rrhf(chosen, rejected, *, lambda_=1.0):  # arXiv:2304.05302; lambda 0.1, 0.5, 1.0, 10.0
    losses = F.relu(rejected.avg_logp - chosen.avg_logp) - lambda_ * chosen.logp
    return losses, chosen.avg_logp, rejected.avg_logp


def slic(chosen, rejected, *, delta=1.0, lambda_=1.0):  # arXiv:2305.10425; delta 0.5, 1, 2, 10
    losses = F.relu(delta - chosen.logp + rejected.logp) - lambda_ * chosen.logp
    return losses, chosen.logp, rejected.logp


def rdpo(chosen, rejected, *, beta=0.1, alpha=0.05):  # arXiv:2403.19159; alpha 0.05, 0.1, 0.5, 1.0
    # A bonus for length: a pair whose chosen answer is longer counts as won sooner, and pulls less.
    chosen_rewards = beta * (chosen.logp - chosen.ref_logp) + alpha * chosen.length
    rejected_rewards = beta * (rejected.logp - rejected.ref_logp) + alpha * rejected.length
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def simpo_sums(chosen, rejected, *, beta=2.5, gamma=1.4):  # Table 5: no length normalization
    losses = simpo.simpo_loss(chosen.logp, rejected.logp, beta, gamma)
    return losses, beta * chosen.logp, beta * rejected.logp


def simpo_sft(chosen, rejected, *, beta=2.5, gamma=1.4, lambda_=0.05):  # SimPO with an SFT term
    losses, chosen_rewards, rejected_rewards = simpo.simpo(chosen, rejected, beta=beta, gamma=gamma)
    return losses - lambda_ * chosen.avg_logp, chosen_rewards, rejected_rewards


def alphapo(chosen, rejected, *, beta=2.5, gamma=1.4, alpha=0.25):  # arXiv:2501.03884
    # beta (1 - p^-alpha) / alpha, where p is exp(avg_logp); as alpha goes to 0 it becomes SimPO.
    chosen_rewards = -beta * torch.expm1(-alpha * chosen.avg_logp) / alpha
    rejected_rewards = -beta * torch.expm1(-alpha * rejected.avg_logp) / alpha
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    return losses, chosen_rewards, rejected_rewards


simpo.OBJECTIVES |= {"sft": sft, "ipo": ipo, "orpo": orpo, "kto": kto, "cpo": cpo, "rrhf": rrhf}
simpo.OBJECTIVES |= {"slic": slic, "rdpo": rdpo, "alphapo": alphapo}
simpo.OBJECTIVES |= {"simpo_sums": simpo_sums, "simpo_sft": simpo_sft}
simpo.NEEDS_REFERENCE |= {"ipo", "kto", "rdpo"}  # they read ref_logp

if __name__ == "__main__":
    simpo.main()
