//! What is continued, and when it ends: several prompts of a request, messages of the assistant's that go on, and the
//! tokens that end an answer.

use serde_json::{Value as Json, json};

use super::common::{V, tiny};
use super::http::Server;
use super::same_text::{alone, model};

fn served(more: &[&str]) -> (tempfile::TempDir, std::path::PathBuf, Server) {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, more);
    (dir, path, server)
}

const PROMPTS: [&str; 4] = ["once upon a time", "hello", "once upon a night there was one", "x"];

/// Each answer is that of a request of its own, in OpenAI's order, however many are computed at once and whatever else is.
#[test]
fn several_prompts_of_a_request_are_as_many_requests() {
    for more in [
        &["--parallel", "1", "--ctx", "256"],
        &["--parallel", "4", "--ctx", "512"],
        &["--parallel", "3", "--ctx", "192"],
    ] {
        let (_dir, path, server) = served(more);
        let expected: Vec<Vec<Json>> =
            PROMPTS.iter().map(|p| (7..9).map(|seed| alone(&path, p, seed, 20)).collect()).collect();
        let request = json!({ "prompt": PROMPTS, "n": 2, "seed": 7, "max_tokens": 20, "temperature": 1.2 });
        let check = |texts: &dyn Fn(usize) -> String| {
            for (i, of_prompt) in expected.iter().enumerate() {
                for (j, answer) in of_prompt.iter().enumerate() {
                    assert_eq!(texts(2 * i + j), answer["text"].as_str().unwrap(), "prompt {i}, answer {j}, {more:?}");
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let answer = server.ok("/v1/completions", &request);
                    assert_eq!(answer["choices"].as_array().unwrap().len(), 8);
                    check(&|i| {
                        assert_eq!(answer["choices"][i]["index"], i);
                        answer["choices"][i]["text"].as_str().unwrap().to_owned()
                    });
                    let sum = |key: &str, each: usize| -> u64 {
                        expected.iter().flat_map(|of| &of[..each]).map(|a| a[key].as_u64().unwrap()).sum()
                    };
                    assert_eq!(answer["usage"]["prompt_tokens"], sum("prompt_tokens", 1));
                    assert_eq!(answer["usage"]["completion_tokens"], sum("generated_tokens", 2));
                    let mut request = request.clone();
                    request["stream"] = true.into();
                    let (events, done) = server.post("/v1/completions", &request).events();
                    assert!(done);
                    check(&|i| {
                        let of_it = |e: &&Json| e["choices"][0]["index"] == i;
                        events.iter().filter(of_it).filter_map(|e| e["choices"][0]["text"].as_str()).collect()
                    });
                });
            }
        });
        assert_eq!(server.get("/slots").json()[0]["is_processing"], false);
    }
}

#[test]
fn prompts_are_texts_or_tokens_and_within_limits() {
    let (_dir, path, server) = served(&["--ctx", "256"]);
    let texts = |prompt: Json| -> Vec<String> {
        let request = json!({ "prompt": prompt, "seed": 3, "max_tokens": 9, "temperature": 1.2 });
        let answer = server.ok("/v1/completions", &request);
        answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect()
    };
    let hello = alone(&path, "hello", 3, 9)["text"].as_str().unwrap().to_owned();
    let ids = server.ok("/tokenize", &json!({ "content": "hello", "add_special": true }))["tokens"].clone();
    for (prompt, n) in [
        (json!("hello"), 1),
        (ids.clone(), 1),
        (json!(["hello"]), 1),
        (json!([ids]), 1),
        (json!(["hello", ids, "hello"]), 3),
    ] {
        assert_eq!(texts(prompt.clone()), vec![hello.clone(); n], "{prompt}");
    }
    // Until the context is full, which is further for the shorter one.
    let request = json!({ "prompt": ["x".repeat(200), "x"], "seed": 3, "temperature": 1.2, "ignore_eos": true });
    let answer = server.ok("/v1/completions", &request);
    let usage = &answer["usage"];
    let (prompt, all) = (usage["prompt_tokens"].as_u64().unwrap(), usage["total_tokens"].as_u64().unwrap());
    assert_eq!((prompt, all), (203, 2 * 257), "{usage}");
    // Each prompt before its answers.
    let request = json!({ "prompt": ["ab", "cd"], "n": 2, "echo": true, "max_tokens": 0 });
    let answer = server.ok("/v1/completions", &request);
    let echoed: Vec<&str> = (0..4).map(|i| answer["choices"][i]["text"].as_str().unwrap()).collect();
    assert_eq!(echoed, ["ab", "ab", "cd", "cd"]);
    for (wrong, words) in [
        (json!({ "prompt": [] }), "a text, a list of token ids, or a list of those"),
        (json!({ "prompt": [[]] }), "the prompt is empty"),
        (json!({ "prompt": ["x", 5] }), "a text, a list of token ids, or a list of those"),
        (json!({ "prompt": [5, "x"] }), "token ids from 0 to"),
        (json!({ "prompt": ["x", "y".repeat(300)] }), "the context holds 256"),
        (json!({ "prompt": vec!["x"; 1025] }), "at most 1024 prompts"),
        (json!({ "prompt": vec!["x"; 100], "n": 128, "max_tokens": 1 }), "more than the 2048 of a request"),
        (json!({ "prompt": vec!["x"; 100], "n": 20, "max_tokens": 200, "logprobs": 20 }), "with their probabilities"),
        (json!({ "prompt": "x", "suffix": "y" }), "suffix"),
        (json!({ "prompt": "x", "best_of": 2 }), "best_of"),
        (json!({ "prompt": "x", "echo": true, "logprobs": 1 }), "echo"),
    ] {
        let reply = server.post("/v1/completions", &wrong);
        assert!(reply.status == 400 && reply.body.contains(words), "{wrong}: {}", reply.body);
    }
    let reply = server.post("/completion", &json!({ "prompt": ["a", "b"] }));
    assert!(reply.status == 400 && reply.body.contains("/v1/completions takes several"), "{}", reply.body);
}

/// Whoever goes away in the middle of many prompts is not computed for, and a server that ends leaves none of them without
/// a word.
#[test]
fn many_prompts_are_given_up_together() {
    let (_dir, _, mut server) = served(&["--parallel", "2", "--ctx", "256", "--grace", "0"]);
    let request = json!({ "prompt": vec!["x"; 400], "n": 2, "max_tokens": 200, "ignore_eos": true, "stream": true });
    let begin = || server.send("POST", "/v1/completions", "", request.to_string().as_bytes());
    let running = begin();
    server.until("llamacpp:tokens_predicted_total", |_| true);
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    // Another one has its place between two prompts.
    server.ok("/v1/completions", &json!({ "prompt": "x", "max_tokens": 3 }));
    drop(running);
    server.until("llamacpp:requests_processing", |n| n == 0.0);
    let cut = begin();
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    server.signal(nix::sys::signal::Signal::SIGTERM);
    let (events, done) = super::http::Reply::read(cut).events();
    assert!(!done || events.iter().any(|e| e["error"].is_object()), "{events:?}");
    assert!(events.iter().any(|e| e["error"]["message"].as_str().is_some_and(|m| m.contains("stopped"))));
    assert_eq!(server.ended().code(), Some(130));
}

#[test]
fn an_answer_ends_by_the_tokens_that_are_to_end_it_and_not_too_early() {
    let (_dir, _, server) = served(&[]);
    let free = json!({ "prompt": "hello", "max_tokens": 30, "seed": 9, "temperature": 1.5, "logit_bias": { "257": -100 },
        "logprobs": 0 });
    let answer = server.ok("/v1/completions", &free);
    let tokens: Vec<String> = serde_json::from_value(answer["choices"][0]["logprobs"]["tokens"].clone()).unwrap();
    assert_eq!(tokens.len(), 30);
    let id = |token: &str| server.ok("/tokenize", &json!({ "content": token }))["tokens"][0].clone();
    let at = (4..30).find(|&i| tokens[i].is_ascii() && !tokens[..i].contains(&tokens[i])).unwrap();
    let mut request = free.clone();
    request["stop_token_ids"] = json!([id(&tokens[at])]);
    let stopped = server.ok("/v1/completions", &request);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["text"], tokens[..at].concat());
    assert_eq!(stopped["usage"]["completion_tokens"], at);
    // Not before so many tokens: it is not drawn till then.
    request["min_tokens"] = (at + 3).into();
    let later = server.ok("/v1/completions", &request);
    assert!(later["usage"]["completion_tokens"].as_u64().unwrap() >= at as u64 + 3, "{later}");
    // A text that is to end it is looked for behind them.
    let mut request = free.clone();
    (request["stop"], request["min_tokens"]) = (tokens[at].clone().into(), (at + 1).into());
    let text = server.ok("/v1/completions", &request)["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.starts_with(&tokens[..=at].concat()), "{text:?} {tokens:?}");
    // The model's own end is likeliest, and is not drawn either before it may.
    let end = json!({ "prompt": "hello", "max_tokens": 30, "seed": 9, "logit_bias": { "257": 100 } });
    assert_eq!(server.ok("/v1/completions", &end)["usage"]["completion_tokens"], 0);
    let mut request = end.clone();
    request["min_tokens"] = 7.into();
    for path in ["/v1/completions", "/completion"] {
        let answer = server.ok(path, &request);
        let n = if path == "/completion" { &answer["tokens_predicted"] } else { &answer["usage"]["completion_tokens"] };
        assert_eq!(*n, 7, "{answer}");
    }
    request["ignore_eos"] = true.into();
    assert_eq!(server.ok("/v1/completions", &request)["usage"]["completion_tokens"], 30);
}

/// The last message goes on where it is the assistant's, in each dialect, and the text is that of its words as a prompt.
#[test]
fn a_message_of_the_assistant_goes_on() {
    let (_dir, path, server) = served(&[]);
    let messages = json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "The answer is " }]);
    let expected = alone(&path, "<user>hi<assistant>The answer is ", 5, 8);
    let text = expected["text"].as_str().unwrap();
    let request = json!({ "messages": messages, "seed": 5, "max_tokens": 8, "temperature": 1.2 });
    let with = |more: Json| {
        let mut request = request.clone();
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        request
    };
    for more in [
        json!({}),
        json!({ "continue_final_message": true }),
        json!({ "continue_final_message": true, "add_generation_prompt": false }),
    ] {
        let answer = server.ok("/v1/chat/completions", &with(more.clone()));
        assert_eq!(answer["choices"][0]["message"]["content"], text, "{more}");
        assert_eq!(answer["usage"]["prompt_tokens"], expected["prompt_tokens"]);
    }
    let parts = json!([{ "type": "text", "text": "The answer is " }]);
    let mut of_anthropic = request.clone();
    for content in [messages[1]["content"].clone(), parts] {
        of_anthropic["messages"][1]["content"] = content;
        let answer = server.ok("/v1/messages", &of_anthropic);
        assert_eq!(answer["content"][0]["text"], text);
    }
    let options = json!({ "seed": 5, "num_predict": 8, "temperature": 1.2 });
    let answer = server.ok("/api/chat", &json!({ "messages": messages, "stream": false, "options": options }));
    assert_eq!(answer["message"]["content"], text);
    let plain = |mut more: Json| {
        more["messages"] = messages.clone();
        server.ok("/apply-template", &more)["prompt"].as_str().unwrap().to_owned()
    };
    assert_eq!(plain(json!({})), "<user>hi<assistant>The answer is ");
    // Whoever wants another turn says so, as at vLLM.
    assert_eq!(plain(json!({ "continue_final_message": false })), "<user>hi<assistant>The answer is <assistant>");
    assert_eq!(plain(json!({ "add_generation_prompt": true })), "<user>hi<assistant>The answer is <assistant>");
    let closed = json!({ "add_generation_prompt": false, "continue_final_message": false });
    assert_eq!(plain(closed), "<user>hi<assistant>The answer is ");
    for wrong in [
        json!({ "continue_final_message": true, "add_generation_prompt": true }),
        json!({ "continue_final_message": true, "messages": [{ "role": "user", "content": "hi" }] }),
        // It cannot be told from what marks the message's end.
        json!({ "messages": [{ "role": "assistant", "content": "~nt:goes-on-here~" }] }),
    ] {
        assert_eq!(server.post("/v1/chat/completions", &with(wrong.clone())).status, 400, "{wrong}");
    }
}

/// Templates write their own things around a message: what is behind its words is cut off, spaces of its own are not.
#[test]
fn a_message_that_goes_on_ends_with_its_words_whatever_the_template() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/templates/");
    let words = "Of course: ";
    for (name, end) in [
        ("Qwen-Qwen2.5-7B-Instruct", "<|im_start|>assistant\nOf course: "),
        ("Qwen-Qwen3-0.6B", "<|im_start|>assistant\n<think>\n\n</think>\n\nOf course: "),
        ("meta-llama-Llama-3.1-8B-Instruct", "<|start_header_id|>assistant<|end_header_id|>\n\nOf course: "),
        ("google-gemma-2-2b-it", "<start_of_turn>model\nOf course: "),
        ("microsoft-Phi-3.5-mini-instruct", "<|assistant|>\nOf course: "),
        ("mistralai-Mistral-Nemo-Instruct-2407", "[INST]hi[/INST]Of course: "),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut f = tiny(2);
        let source = std::fs::read_to_string(format!("{folder}{name}.jinja")).unwrap();
        f.set("tokenizer.chat_template", V::Str(source));
        let path = f.write(dir.path(), "m.gguf");
        let server = Server::start(&path, &[]);
        let messages = json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": words }]);
        let reply = server.post("/apply-template", &json!({ "messages": messages }));
        assert_eq!(reply.status, 200, "{name}: {}", reply.body);
        let prompt = reply.json()["prompt"].as_str().unwrap().to_owned();
        assert!(prompt.ends_with(end), "{name}: {prompt:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut f = tiny(2);
    let source = std::fs::read_to_string(format!("{folder}openai-gpt-oss-120b.jinja")).unwrap();
    f.set("tokenizer.chat_template", V::Str(source));
    let server = Server::start(&f.write(dir.path(), "m.gguf"), &[]);
    let messages = json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": words }]);
    let reply = server.post("/v1/chat/completions", &json!({ "messages": messages }));
    assert!(reply.status == 400 && reply.body.contains("answers in channels"), "{}", reply.body);
}

/// SmolLM3's template takes tools under a name of its own, and prints no calls of earlier messages.
#[test]
fn tools_are_given_under_the_templates_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut f = tiny(2);
    let template = "{% if xml_tools or python_tools %}{% if xml_tools %}<tools>{% for tool in xml_tools[:] %}{{ tool.function.name }};{% endfor %}</tools>as <tool_call>{}</tool_call>{% endif %}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    f.set("tokenizer.chat_template", V::Str(template.into()));
    let server = Server::start(&f.write(dir.path(), "m.gguf"), &[]);
    let tools = json!([{ "type": "function", "function": { "name": "weather", "parameters": { "type": "object" } } }]);
    let call =
        json!({ "id": "a", "type": "function", "function": { "name": "weather", "arguments": "{\"city\":\"Rome\"}" } });
    let messages = json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "a", "content": "warm" }]);
    let prompt = server.ok("/apply-template", &json!({ "messages": messages, "tools": tools }))["prompt"].clone();
    assert_eq!(
        prompt,
        "<tools>weather;</tools>as <tool_call>{}</tool_call><user>hi<assistant><tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\":\"Rome\"}}\n</tool_call><tool>warm<assistant>"
    );
    // Without tools nothing is said of any.
    let prompt = server.ok("/apply-template", &json!({ "messages": [{ "role": "user", "content": "hi" }] }));
    assert_eq!(prompt["prompt"], "<user>hi<assistant>");
    // A call in the answer is one.
    let request = json!({ "messages": [{ "role": "user", "content": "hi" }], "tools": tools, "tool_choice": "required",
        "max_tokens": 200, "seed": 1 });
    let answer = server.ok("/v1/chat/completions", &request);
    let choice = &answer["choices"][0];
    assert!(choice["message"]["tool_calls"][0]["function"]["name"] == "weather" || choice["finish_reason"] == "length");
}
