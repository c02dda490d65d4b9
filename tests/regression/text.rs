//! Chat templates, stop texts, sampling, and the conversation.
