//! Which pods match which of several selectors: a bit for each pod and selector.
//!
//! Selectors that match the same pods share a bit, so that hundreds of selectors that match
//! thousands of pods cost little more than one.
use super::labels::Slot;
use crate::compile::SelectorId;

pub(super) struct Matches {
    /// Selectors that match the same pods.
    groups: Vec<Vec<SelectorId>>,
    /// How many words each pod has.
    words: usize,
    /// Of each slot a bit for each group.
    bits: Vec<u64>,
}

impl Matches {
    /// No matches of up to `selectors` selectors among slots below `end`.
    pub(super) fn new(end: usize, selectors: usize) -> Self {
        let words = selectors.div_ceil(64);
        Self {
            groups: Vec::new(),
            words,
            bits: vec![0; end * words],
        }
    }

    /// Adds a selector with the slots that match it; `None`: those of the one before.
    pub(super) fn add(&mut self, id: SelectorId, slots: Option<&[Slot]>) {
        if let Some(slots) = slots {
            let group = self.groups.len();
            for slot in slots {
                self.bits[*slot as usize * self.words + group / 64] |= 1 << (group % 64);
            }
            self.groups.push(Vec::new());
        }
        if let Some(group) = self.groups.last_mut() {
            group.push(id);
        }
    }

    /// The slots that match any selector, each with the bits of its groups.
    pub(super) fn slots(&self) -> impl Iterator<Item = (Slot, &[u64])> {
        let slots = (0..).zip(self.bits.chunks_exact(self.words));
        slots.filter(|(_, groups)| groups.iter().any(|word| *word != 0))
    }

    /// The selectors of these groups, in the order in which they were added.
    pub(super) fn ids(&self, groups: &[u64]) -> impl Iterator<Item = SelectorId> {
        let has = |group: usize| groups[group / 64] >> (group % 64) & 1 == 1;
        let groups = self.groups.iter().enumerate();
        let groups = groups.filter(move |(group, _)| has(*group));
        groups.flat_map(|(_, ids)| ids).copied()
    }
}
