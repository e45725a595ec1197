#!/usr/bin/env bash
# statsmodels 0.15.0: SimpleExpSmoothing and Holt refuse their own default.
#
# Both hand initialization_method=None on to ExponentialSmoothing, and that takes nothing but a string
# in 0.15.0, though the docstring still lists None. The shortest call, SimpleExpSmoothing(y).fit(),
# is a TypeError; 0.14.6 takes it. ExponentialSmoothing(y) works, its default is "estimated". Saying
# "estimated" works in both versions; it need not be the forecast that None gave.
#
# Seen: 0.14.6: SimpleExpSmoothing 10.00, Holt 12.00, ExponentialSmoothing 9.40, estimated 9.40
#       0.15.0: SimpleExpSmoothing TypeError, Holt TypeError, ExponentialSmoothing 9.40, estimated 9.40
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
cd "$work"
cat > forecast.py <<'PY'
import statsmodels
from statsmodels.tsa.holtwinters import ExponentialSmoothing, Holt, SimpleExpSmoothing

y = [3.0, 5.0, 9.0, 20.0, 12.0, 8.0, 7.0, 9.0, 11.0, 10.0]


def told(model, **how):
    try:
        return f"{model(y, **how).fit().forecast(1)[0]:.2f}"
    except TypeError as error:
        assert str(error) == "initialization_method must be a string", "the behaviour has changed"
        return "TypeError"


models = (SimpleExpSmoothing, Holt, ExponentialSmoothing)
seen = {model.__name__: told(model) for model in models}
seen["estimated"] = told(SimpleExpSmoothing, initialization_method="estimated")
print(f"{statsmodels.__version__}:", ", ".join(f"{name} {what}" for name, what in seen.items()))
refused = [name for name, what in seen.items() if what == "TypeError"]
wanted = [] if statsmodels.__version__ == "0.14.6" else ["SimpleExpSmoothing", "Holt"]
assert refused == wanted, "the behaviour has changed"
PY
for version in 0.14.6 0.15.0; do
  python3 -m pip --python "$work/venv/bin/python" install -q statsmodels==$version numpy==2.4.6 pandas==3.1.1 scipy==1.17.1
  "$work/venv/bin/python" forecast.py
done
