"""Models that answer by a script, in the place of a language model or a judge."""

from trl_vpo.models.requests import AnsweringModel


class ScriptedModel(AnsweringModel):
    """Answers what `says(request)` returns; keeps what it was asked, request by request and call by call."""

    def __init__(self, says):
        self.says = says
        self.asked, self.calls = [], []  # requests; (requests, sampling)

    def answer(self, requests, sampling):
        self.calls.append((list(requests), sampling))
        answers = []
        for request in requests:
            answers.append(self.says(request))
            self.asked.append(request)
        return answers

    def record(self):
        return {"model": "scripted", "adapter": None, "revision": None}


def text_of(request):
    """The text of a request's first message."""
    return request.messages[0]["content"][-1]["text"]
