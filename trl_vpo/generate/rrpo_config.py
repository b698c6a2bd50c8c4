"""Settings of RRPO's generation pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from trl_vpo.generate.config import GenerateConfig, check_template
from trl_vpo.generate.judge import DIFFERENCES_PROMPT, REWRITE_PROMPT
from trl_vpo.media.corruptions import MODES, PerturbSettings
from trl_vpo.models.config import option
from trl_vpo.models.requests import Sampling
from trl_vpo.text.answers import SHORT_WORDS


@dataclass
class RRPOGenerateConfig(GenerateConfig):
    """Settings of RRPO's pipeline. A prompt suffix is added below questions of its kind; it is not trained on."""

    perturbation: str = option(
        "mask+local", "Perturbation of the media; images can only be masked.", choices=list(MODES)
    )
    mask_area_min: float = option(0.25, "Smallest share of the frame that is masked.")
    mask_area_max: float = option(0.5, "Largest share of the frame that is masked.")
    shuffle_window: int = option(4, "Frames that change places with each other in local shuffling.")
    attempts: int = option(1, "Maximum perturbations tried until the model answers wrongly.")
    short_words: int = option(
        SHORT_WORDS, "Maximum words of a short answer; a wrong one may have this many more than the ground truth."
    )
    open_check: str = option(
        "judge",
        "Check of open-ended answers, and of short ones that no rule decides: by the judge, or exact, for answers in "
        "a fixed form: any other words than the ground truth's are wrong, and become the rejected response.",
        choices=["judge", "exact"],
    )
    max_changed: float = option(0.6, "Largest share of words that the judge's rewrite may change.")
    choice_prompt_suffix: str = option(
        "Answer with the letter of the right option.", "Added below a multiple-choice question."
    )
    yes_no_prompt_suffix: str = option("Answer yes or no.", "Added below a yes/no question.")
    short_prompt_suffix: str = option(
        "Answer with a word or a short phrase.", "Added below a question with a short answer."
    )
    open_prompt_suffix: str = option("", "Added below an open-ended question.")
    differences_prompt: str = option(
        DIFFERENCES_PROMPT, "The judge's first prompt, with {question}, {truth} and {answer}, the model's answer."
    )
    rewrite_prompt: str = option(
        REWRITE_PROMPT, "The judge's second prompt, with {differences} too; other braces are doubled."
    )
    judge_temperature: float = option(0.0, "Temperature of the judge.")
    judge_max_new_tokens: int = option(1024, "Maximum length of the judge's reply in tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.perturb_settings()
        texts = {"question", "truth", "answer"}
        check_template("differences_prompt", self.differences_prompt, texts)
        check_template("rewrite_prompt", self.rewrite_prompt, texts | {"differences"})

    def perturb_settings(self) -> PerturbSettings:
        return PerturbSettings(self.perturbation, (self.mask_area_min, self.mask_area_max), self.shuffle_window)

    def judge_sampling(self) -> Sampling:
        return Sampling(self.judge_max_new_tokens, self.judge_temperature, top_p=1.0)
