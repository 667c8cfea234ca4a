"""The judge as a reward, over HTTP: `python -m real_openrlhf.judge serve --rewards`.

requests.py  what is asked: OpenRLHF's form and the plain one, as items for the judge
answers.py   what is answered: E[score] as a reward
scorer.py    a bounded queue of items before the judge
app.py       routes, limits, token, metrics
server.py    vLLM's server below, the HTTP server above
"""
