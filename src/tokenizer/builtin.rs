//! Chat templates by name, for models whose file has none or a wrong one.
//!
//! Names and texts are those of llama.cpp (`src/llama-chat.cpp`), written as
//! Jinja; `tests/fixtures/builtin_templates.json` holds what its C++ renders.

/// How a template lays out a conversation. In texts, `$c` is a message's content, `$t` the content without white
/// space around it, `$r` the role.
enum Form {
    /// The same text for each message, then the opening of the assistant's turn.
    Each(&'static str, &'static str),
    /// A text before all messages, one for each role (system, user, all others), then the opening.
    Roles(&'static str, [&'static str; 3], &'static str),
    /// Jinja with the abbreviations above.
    Jinja(&'static str),
}

use Form::{Each, Jinja, Roles};

const TEMPLATES: &[(&str, Form)] = &[
    ("bailing", Jinja(BAILING)),
    ("bailing-think", Jinja(BAILING_THINK)),
    ("bailing2", Jinja(BAILING_2)),
    ("chatglm3", Roles("[gMASK]sop", ["<|$r|>\n $c"; 3], "<|assistant|>")),
    ("chatglm4", Roles("[gMASK]<sop>", ["<|$r|>\n$c"; 3], "<|assistant|>\n")),
    ("chatml", Each("<|im_start|>$r\n$c<|im_end|>\n", "<|im_start|>assistant\n")),
    (
        "command-r",
        Roles(
            "",
            [
                "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>$t<|END_OF_TURN_TOKEN|>",
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>$t<|END_OF_TURN_TOKEN|>",
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>$t<|END_OF_TURN_TOKEN|>",
            ],
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
    ),
    ("deepseek", Roles("", ["$c", "### Instruction:\n$c\n", "### Response:\n$c\n<|EOT|>\n"], "### Response:\n")),
    ("deepseek-ocr", Each("$c", "")),
    ("deepseek2", Roles("", ["$c\n\n", "User: $c\n\n", "Assistant: $c<｜end▁of▁sentence｜>"], "Assistant:")),
    ("deepseek3", Roles("", ["$c\n\n", "<｜User｜>$c", "<｜Assistant｜>$c<｜end▁of▁sentence｜>"], "<｜Assistant｜>")),
    ("exaone-moe", Each("<|$r|>\n$t<|endofturn|>\n", "<|assistant|>\n")),
    (
        "exaone3",
        Roles("", ["[|system|]$t[|endofturn|]\n", "[|user|]$t\n", "[|assistant|]$t[|endofturn|]\n"], "[|assistant|]"),
    ),
    ("exaone4", Jinja(EXAONE_4)),
    ("falcon3", Each("<|$r|>\n$c\n", "<|assistant|>\n")),
    ("gemma", Jinja(GEMMA)),
    ("gigachat", Jinja(GIGACHAT)),
    ("glmedge", Each("<|$r|>\n$c", "<|assistant|>")),
    ("gpt-oss", Jinja(GPT_OSS)),
    ("granite", Jinja(GRANITE_3)),
    ("granite-4.0", Jinja(GRANITE_4)),
    ("granite-4.1", Jinja(GRANITE_4)),
    (
        "grok-2",
        Roles(
            "",
            ["System: $t<|separator|>\n\n", "Human: $t<|separator|>\n\n", "Assistant: $c<|separator|>\n\n"],
            "Assistant:",
        ),
    ),
    ("hunyuan-dense", Jinja(HUNYUAN_DENSE)),
    ("hunyuan-moe", Jinja(HUNYUAN_MOE)),
    ("hunyuan-vl", Jinja(HUNYUAN_VL)),
    ("kimi-k2", Jinja(KIMI_K2)),
    ("llama2", Jinja(LLAMA_2)),
    ("llama2-sys", Jinja(LLAMA_2_SYS)),
    ("llama2-sys-bos", Jinja(LLAMA_2_SYS_BOS)),
    ("llama2-sys-strip", Jinja(LLAMA_2_SYS_STRIP)),
    (
        "llama3",
        Each(
            "<|start_header_id|>$r<|end_header_id|>\n\n$t<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ),
    ("llama4", Each("<|header_start|>$r<|header_end|>\n\n$t<|eot|>", "<|header_start|>assistant<|header_end|>\n\n")),
    ("megrez", Each("<|role_start|>$r<|role_end|>$c<|turn_end|>", "<|role_start|>assistant<|role_end|>")),
    ("minicpm", Roles("", ["$t", "<用户>$t<AI>", "$t"], "")),
    ("mistral-v1", Jinja(MISTRAL_V1)),
    ("mistral-v3", Jinja(MISTRAL_V3)),
    ("mistral-v3-tekken", Jinja(MISTRAL_V3_TEKKEN)),
    ("mistral-v7", Roles("", ["[SYSTEM_PROMPT] $c[/SYSTEM_PROMPT]", "[INST] $c[/INST]", " $c</s>"], "")),
    ("mistral-v7-tekken", Roles("", ["[SYSTEM_PROMPT]$c[/SYSTEM_PROMPT]", "[INST]$c[/INST]", "$c</s>"], "")),
    ("monarch", Jinja(MONARCH)),
    ("openchat", Jinja(OPENCHAT)),
    ("orion", Jinja(ORION)),
    ("pangu-embedded", Jinja(PANGU)),
    ("phi3", Each("<|$r|>\n$c<|end|>\n", "<|assistant|>\n")),
    ("phi4", Each("<|im_start|>$r<|im_sep|>$c<|im_end|>", "<|im_start|>assistant<|im_sep|>")),
    ("rwkv-world", Jinja(RWKV_WORLD)),
    ("seed_oss", Jinja(SEED_OSS)),
    (
        "smolvlm",
        Roles(
            "<|im_start|>",
            ["$c\n\n", "User: $c<end_of_utterance>\n", "Assistant: $c<end_of_utterance>\n"],
            "Assistant:",
        ),
    ),
    ("solar-open", Each("<|begin|>$r<|content|>$c<|end|>", "<|begin|>assistant")),
    ("vicuna", Roles("", ["$c\n\n", "USER: $c\n", "ASSISTANT: $c</s>\n"], "ASSISTANT:")),
    ("vicuna-orca", Roles("", ["SYSTEM: $c\n", "USER: $c\n", "ASSISTANT: $c</s>\n"], "ASSISTANT:")),
    ("yandex", Jinja(YANDEX)),
    ("zephyr", Each("<|$r|>\n$c<|endoftext|>\n", "<|assistant|>\n")),
];

/// Shorter names for what is meant most often by them.
const ALIASES: &[(&str, &str)] =
    &[("mistral", "mistral-v3"), ("phi", "phi3"), ("llama-3", "llama3"), ("command", "command-r")];

/// The names of all templates, ascending.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    TEMPLATES.iter().map(|(name, _)| *name)
}

/// The Jinja text of a template.
pub(super) fn source(name: &str) -> Option<String> {
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name);
    let (_, form) = TEMPLATES.iter().find(|(n, _)| *n == name)?;
    let opened = |opening: &str| format!("{{% if add_generation_prompt %}}{opening}{{% endif %}}");
    let short = match form {
        Each(text, opening) => format!("{{% for m in messages %}}{text}{{% endfor %}}{}", opened(opening)),
        Roles(before, [system, user, other], opening) => format!(
            "{before}{{% for m in messages %}}{{% if m.role == 'system' %}}{system}{{% elif m.role == 'user' %}}{user}{{% else %}}{other}{{% endif %}}{{% endfor %}}{}",
            opened(opening)
        ),
        Jinja(text) => (*text).to_owned(),
    };
    let content = "{{ m.content if m.content is not none else '' }}";
    let trimmed = "{{ (m.content if m.content is not none else '') | trim }}";
    Some(short.replace("$c", content).replace("$t", trimmed).replace("$r", "{{ m.role }}"))
}

const MISTRAL_V1: &str = "{% set ns = namespace(open=false) %}{% for m in messages %}{% if not ns.open %}{{ ' [INST] ' }}{% set ns.open = true %}{% endif %}{% if m.role == 'system' %}$c{{ '\n\n' }}{% elif m.role == 'user' %}$c [/INST]{% else %}{{ ' ' }}$c</s>{% set ns.open = false %}{% endif %}{% endfor %}";
const MISTRAL_V3: &str = "{% set ns = namespace(open=false) %}{% for m in messages %}{% if not ns.open %}{{ '[INST] ' }}{% set ns.open = true %}{% endif %}{% if m.role == 'system' %}$c{{ '\n\n' }}{% elif m.role == 'user' %}$c[/INST]{% else %}{{ ' ' }}$t</s>{% set ns.open = false %}{% endif %}{% endfor %}";
const MISTRAL_V3_TEKKEN: &str = "{% set ns = namespace(open=false) %}{% for m in messages %}{% if not ns.open %}[INST]{% set ns.open = true %}{% endif %}{% if m.role == 'system' %}$c{{ '\n\n' }}{% elif m.role == 'user' %}$c[/INST]{% else %}$c</s>{% set ns.open = false %}{% endif %}{% endfor %}";
const LLAMA_2: &str = "{{ '[INST] ' }}{% set ns = namespace(open=true) %}{% for m in messages %}{% if not ns.open %}{{ '[INST] ' }}{% set ns.open = true %}{% endif %}{% if m.role == 'system' %}$c{{ '\n' }}{% elif m.role == 'user' %}$c [/INST]{% else %}$c</s>{% set ns.open = false %}{% endif %}{% endfor %}";
const LLAMA_2_SYS: &str = "{{ '[INST] ' }}{% set ns = namespace(open=true) %}{% for m in messages %}{% if not ns.open %}{{ '[INST] ' }}{% set ns.open = true %}{% endif %}{% if m.role == 'system' %}{{ '<<SYS>>\n' }}$c{{ '\n<</SYS>>\n\n' }}{% elif m.role == 'user' %}$c [/INST]{% else %}$c</s>{% set ns.open = false %}{% endif %}{% endfor %}";
const LLAMA_2_SYS_BOS: &str = "{{ '[INST] ' }}{% set ns = namespace(open=true) %}{% for m in messages %}{% if not ns.open %}{{ '<s>[INST] ' }}{% set ns.open = true %}{% endif %}{% if m.role == 'system' %}{{ '<<SYS>>\n' }}$c{{ '\n<</SYS>>\n\n' }}{% elif m.role == 'user' %}$c [/INST]{% else %}$c</s>{% set ns.open = false %}{% endif %}{% endfor %}";
const LLAMA_2_SYS_STRIP: &str = "{{ '[INST] ' }}{% set ns = namespace(open=true) %}{% for m in messages %}{% if not ns.open %}{{ '[INST] ' }}{% set ns.open = true %}{% endif %}{% if m.role == 'system' %}{{ '<<SYS>>\n' }}$t{{ '\n<</SYS>>\n\n' }}{% elif m.role == 'user' %}$t [/INST]{% else %}$t</s>{% set ns.open = false %}{% endif %}{% endfor %}";
/// System messages go before the next user's.
const GEMMA: &str = "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = ns.system + (m.content | trim) %}{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' }}{% if ns.system and m.role != 'assistant' %}{{ ns.system }}{{ '\n\n' }}{% set ns.system = '' %}{% endif %}$t<end_of_turn>{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}";
/// The end-of-text token behind `Assistant: ` opens the assistant's turn.
const ORION: &str = "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% elif m.role == 'user' %}{{ 'Human: ' }}{% if ns.system %}{{ ns.system }}{{ '\n\n' }}{% set ns.system = '' %}{% endif %}$c{{ '\n\nAssistant: </s>' }}{% else %}$c</s>{% endif %}{% endfor %}";
const MONARCH: &str = "{% for m in messages %}{% if not loop.first %}<s>{% endif %}$r{{ '\n' }}$c</s>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<s>assistant{{ '\n' }}{% endif %}";
const OPENCHAT: &str = "{% for m in messages %}{% if m.role == 'system' %}$c<|end_of_turn|>{% else %}GPT4 Correct {{ m.role[:1] | upper }}{{ m.role[1:] }}{{ ': ' }}$c<|end_of_turn|>{% endif %}{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}";
const EXAONE_4: &str = "{% for m in messages %}{% if m.role == 'user' %}[|user|]$t{{ '\n' }}{% else %}[|$r|]$t[|endofturn|]{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}";
const RWKV_WORLD: &str = "{% for m in messages %}{% if m.role == 'system' %}System: $t{{ '\n\n' }}{% elif m.role == 'user' %}User: $t{{ '\n\n' }}{% if loop.last %}Assistant:{% endif %}{% else %}Assistant: $t{{ '\n\n' }}{% endif %}{% endfor %}";
const GRANITE_3: &str = "{% for m in messages %}<|start_of_role|>$r<|end_of_role|>{% if m.role == 'assistant_tool_call' %}<|tool_call|>{% endif %}$c<|end_of_text|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}";
const GRANITE_4: &str = "{% for m in messages %}{% if m.role == 'assistant_tool_call' %}<|start_of_role|>assistant<|end_of_role|><|tool_call|>{% else %}<|start_of_role|>$r<|end_of_role|>{% endif %}$c<|end_of_text|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}";
const GIGACHAT: &str = "<s>{% for m in messages %}{% if m.role == 'system' %}$c<|message_sep|>{% elif m.role == 'user' %}user<|role_sep|>$c<|message_sep|>available functions<|role_sep|>[]<|message_sep|>{% else %}$r<|role_sep|>$c<|message_sep|>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant<|role_sep|>{% endif %}";
const YANDEX: &str = "{% for m in messages %}{% if m.role == 'user' %}{{ ' Пользователь: ' }}$c{{ '\n\n' }}{% elif m.role == 'assistant' %}{{ ' Ассистент: ' }}$c{{ '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' Ассистент:[SEP]' }}{% endif %}";
const BAILING: &str = "{% for m in messages %}<role>{{ 'HUMAN' if m.role == 'user' else m.role | upper }}</role>$c{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}";
const BAILING_THINK: &str = "{% for m in messages %}<role>{{ 'HUMAN' if m.role == 'user' else m.role | upper }}</role>$c{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role><think>{% endif %}";
const BAILING_2: &str = "{% if not messages or messages[0].role != 'system' %}<role>SYSTEM</role>detailed thinking off<|role_end|>{% endif %}{% for m in messages %}<role>{{ 'HUMAN' if m.role == 'user' else m.role | upper }}</role>$c<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}";
const HUNYUAN_MOE: &str = "{% for m in messages %}{% if m.role == 'system' %}<|startoftext|>$c<|extra_4|>{% elif m.role == 'assistant' %}$c<|eos|>{% else %}<|startoftext|>$c<|extra_0|>{% endif %}{% endfor %}";
const HUNYUAN_DENSE: &str = "{% for m in messages %}{% if loop.first and m.role == 'system' %}$c<｜hy_place▁holder▁no▁3｜>{% elif m.role == 'assistant' %}<｜hy_Assistant｜>$c<｜hy_place▁holder▁no▁2｜>{% elif m.role == 'user' %}<｜hy_User｜>$c<｜hy_Assistant｜>{% endif %}{% endfor %}";
const HUNYUAN_VL: &str = "<｜hy_begin▁of▁sentence｜>{% for m in messages %}{% if loop.first and m.role == 'system' %}$c<｜hy_place▁holder▁no▁3｜>{% elif m.role == 'user' %}$c<｜hy_User｜>{% elif m.role == 'assistant' %}$c<｜hy_Assistant｜>{% endif %}{% endfor %}";
const GPT_OSS: &str = "{% for m in messages %}<|start|>$r<|message|>$c{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}";
const KIMI_K2: &str = "{% for m in messages %}{% if m.role == 'system' %}<|im_system|>system<|im_middle|>{% elif m.role == 'user' %}<|im_user|>user<|im_middle|>{% elif m.role == 'assistant' %}<|im_assistant|>assistant<|im_middle|>{% elif m.role == 'tool' %}<|im_system|>tool<|im_middle|>{% endif %}$c<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}";
const SEED_OSS: &str = "{% for m in messages %}<seed:bos>$r{{ '\n' }}{% if m.role == 'assistant' %}$t{% else %}$c{% endif %}<seed:eos>{% endfor %}{% if add_generation_prompt %}<seed:bos>assistant{{ '\n' }}{% endif %}";
const PANGU: &str = "{% if messages and messages[0].role != 'system' %}[unused9]系统：[unused10]{% endif %}{% for m in messages %}[unused9]{{ {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具', 'function': '方法'}[m.role] }}：$c[unused10]{% endfor %}{% if add_generation_prompt %}[unused9]助手：{% endif %}";
