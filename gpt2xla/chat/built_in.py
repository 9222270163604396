"""The chat templates that have a name. What stands between {% generation %} and {% endgeneration %} is trained on."""

# The layout that OpenAI called ChatML: https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
_CHATML = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The prompt of Stanford Alpaca (Taori et al. 2023); a system message replaces its first sentences. An answer ends with the
# end of text. Further turns follow after an empty line.
_ALPACA = """\
{{- bos_token }}
{%- if messages[0]['role'] != 'system' %}
    {{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\\n' }}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
        {%- if not loop.last %}
            {{- '\\n\\n' }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('alpaca has a place for user, assistant and one system message at the start; use chatml') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""

TEMPLATES = {"chatml": _CHATML, "alpaca": _ALPACA}
