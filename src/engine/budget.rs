//! A bound on the tokens of a text's reasoning: behind so many, the mark that ends it is the only token that may come.

/// How many tokens reasoning may have, and which tokens stand around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThoughtBudget {
    /// Tokens between the marks at most.
    pub tokens: usize,
    /// The token that opens reasoning; `None` where the prompt has opened it.
    pub open: Option<u32>,
    /// The token that ends it.
    pub close: u32,
}

/// Follows a text and says where its reasoning must end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thought {
    budget: ThoughtBudget,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Before,
    /// With so many tokens so far.
    Within(usize),
    Over,
}

impl Thought {
    /// Of a text that begins.
    pub(super) fn new(budget: ThoughtBudget) -> Thought {
        let state = if budget.open.is_some() { State::Before } else { State::Within(0) };
        Thought { budget, state }
    }

    /// Goes on with a token that was drawn.
    pub(super) fn accept(&mut self, token: u32) {
        self.state = match self.state {
            State::Before if Some(token) == self.budget.open => State::Within(0),
            State::Within(_) if token == self.budget.close => State::Over,
            State::Within(n) => State::Within(n + 1),
            other => other,
        };
    }

    /// The token that must come next, if one must.
    pub(super) fn forced(&self) -> Option<u32> {
        matches!(self.state, State::Within(n) if n >= self.budget.tokens).then_some(self.budget.close)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasoning_ends_where_its_budget_does() {
        let forced = |open: Option<u32>, tokens: usize, text: &[u32]| {
            let mut thought = Thought::new(ThoughtBudget { tokens, open, close: 9 });
            text.iter().for_each(|t| thought.accept(*t));
            thought.forced()
        };
        assert_eq!(forced(None, 0, &[]), Some(9));
        assert_eq!(forced(None, 2, &[1]), None);
        assert_eq!(forced(None, 2, &[1, 2]), Some(9));
        // What follows the mark is no reasoning, and neither is what has none.
        assert_eq!(forced(None, 2, &[1, 9, 3, 4, 5]), None);
        assert_eq!(forced(Some(8), 2, &[1, 2, 3]), None);
        assert_eq!(forced(Some(8), 2, &[8, 2, 3]), Some(9));
        assert_eq!(forced(Some(8), 0, &[8]), Some(9));
    }
}
