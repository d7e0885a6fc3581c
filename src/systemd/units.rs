//! What systemd tells people of units.

use std::collections::BTreeMap;

use super::proxy::ListedUnit;
use super::{Systemd, SystemdError};

impl Systemd {
    /// The descriptions of the units whose names are like this, by name.
    pub async fn descriptions(
        &self,
        pattern: &str,
    ) -> Result<BTreeMap<String, String>, SystemdError> {
        let _turn = self.calls.acquire().await;
        let bus = self.bus().await?;
        let patterns = [pattern];
        let listed = bus.manager.list_units_by_patterns(&[], &patterns);
        let units = self
            .call(&bus, "ListUnitsByPatterns", pattern, listed)
            .await?;
        let named = |unit: ListedUnit| (unit.0, unit.1);
        Ok(units.into_iter().map(named).collect())
    }
}
