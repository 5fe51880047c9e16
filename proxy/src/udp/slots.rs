//! A slot map for flows: slots, and the ids that distinguish successive flows of one slot.

/// Identifies a flow while it exists. The generation distinguishes it from later flows in the same slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FlowId {
    /// The number of its slot.
    pub(super) slot: u32,
    generation: u32,
}

impl FlowId {
    /// Number of generations before they repeat. The two highest bits of [`Self::to_u64`] are clear.
    const GENERATIONS: u32 = 1 << 30;

    /// The id as one number, for epoll.
    pub(super) fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// The reverse of [`Self::to_u64`].
    pub(super) fn from_u64(number: u64) -> Self {
        let [low, high] = [number & u64::from(u32::MAX), number >> 32];
        let part = |number| u32::try_from(number).unwrap_or(u32::MAX);
        Self { slot: part(low), generation: part(high) }
    }
}

/// Slots that are reused once they are free.
#[derive(Debug)]
pub(super) struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    used: Option<T>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// The content of the slot of `id`, unless it was removed.
    pub(super) fn get(&self, id: FlowId) -> Option<&T> {
        let slot = self.slots.get(id.slot as usize)?;
        slot.used.as_ref().filter(|_| slot.generation == id.generation)
    }

    /// Like [`Self::get`], but mutable.
    pub(super) fn get_mut(&mut self, id: FlowId) -> Option<&mut T> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        slot.used.as_mut().filter(|_| slot.generation == id.generation)
    }

    /// The content of `slot`, if it is in use.
    pub(super) fn at(&self, slot: u32) -> Option<&T> {
        self.slots[slot as usize].used.as_ref()
    }

    /// Like [`Self::at`], but mutable.
    pub(super) fn at_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.slots[slot as usize].used.as_mut()
    }

    /// The id of the current or next content of `slot`.
    pub(super) fn id_of(&self, slot: u32) -> FlowId {
        FlowId { slot, generation: self.slots[slot as usize].generation }
    }

    /// The id of the next insertion.
    pub(super) fn next_id(&self) -> FlowId {
        let number = |index: usize| u32::try_from(index).expect("descriptors run out before slots do");
        match self.free.last() {
            Some(&slot) => self.id_of(slot),
            None => FlowId { slot: number(self.slots.len()), generation: 0 },
        }
    }

    /// Puts `value` into a free slot, with the id [`Self::next_id`].
    pub(super) fn insert(&mut self, value: T) -> FlowId {
        let id = self.next_id();
        if self.free.pop().is_none() {
            self.slots.push(Slot { generation: id.generation, used: None });
        }
        self.slots[id.slot as usize].used = Some(value);
        id
    }

    /// Removes the content of `slot`. Its id is not used again until the generations repeat.
    pub(super) fn remove(&mut self, slot: u32) -> Option<T> {
        let emptied = &mut self.slots[slot as usize];
        let value = emptied.used.take()?;
        emptied.generation = (emptied.generation + 1) % FlowId::GENERATIONS;
        self.free.push(slot);
        Some(value)
    }

    /// The slots in use, with their content.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.slots).filter_map(|(number, slot)| Some((number, slot.used.as_ref()?)))
    }

    /// The content of at most `count` slots from number `first`. Returns no next number at the end.
    pub(super) fn some_from(
        &mut self,
        first: usize,
        count: usize,
    ) -> (impl Iterator<Item = &mut T>, Option<usize>) {
        let all = self.slots.len();
        let some = first.min(all)..first.saturating_add(count).min(all);
        let next = (some.end < all).then_some(some.end);
        (self.slots[some].iter_mut().filter_map(|slot| slot.used.as_mut()), next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_outlive_what_it_names() {
        let mut slots = Slots::default();
        let old = slots.insert("old");
        assert_eq!(FlowId::from_u64(old.to_u64()), old);
        assert_eq!(slots.remove(old.slot), Some("old"));
        assert_eq!(slots.remove(old.slot), None);
        let next = slots.next_id();
        let new = slots.insert("new");
        assert_eq!((new, new.slot), (next, old.slot), "free slots are used again");
        assert_eq!(slots.get(old), None);
        assert_eq!(slots.get_mut(old), None);
        assert_eq!(slots.get(new), Some(&"new"));
        assert_eq!(FlowId::from_u64(new.to_u64()), new);
    }

    #[test]
    fn the_highest_bits_of_a_name_stay_clear() {
        let last = FlowId { slot: u32::MAX, generation: FlowId::GENERATIONS - 1 };
        assert_eq!(last.to_u64() >> 62, 0);
        let mut slots =
            Slots { slots: vec![Slot { generation: last.generation, used: Some(()) }], free: vec![] };
        slots.remove(0);
        assert_eq!(slots.next_id(), FlowId { slot: 0, generation: 0 });
    }

    #[test]
    fn a_walk_in_parts_meets_each_once() {
        let mut slots = Slots::default();
        for number in 0..10 {
            slots.insert(number);
        }
        slots.remove(4);
        let (mut met, mut next) = (Vec::new(), Some(0));
        while let Some(first) = next {
            let (some, after) = slots.some_from(first, 3);
            met.extend(some.map(|number| *number));
            next = after;
        }
        assert_eq!(met, [0, 1, 2, 3, 5, 6, 7, 8, 9]);
    }
}
