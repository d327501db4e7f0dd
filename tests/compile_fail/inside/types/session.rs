
fn start_without_securing(accepted: Accepted<'_>) {
    let _ = Started::start(accepted); //~ E0308
}

async fn ask_for_a_token_in_clear(secured: Secured<'_>) {
    let _ = Identified::identify(secured).await; //~ E0308
}

fn route_without_a_token(started: Started<'_>) {
    let _ = Routed::route(started); //~ E0308
}

async fn lease_without_a_route(identified: Identified<'_>) {
    let _ = Leased::lease(identified).await; //~ E0308
}

async fn attach_without_a_lease(routed: Routed<'_>) {
    let _ = Attached::attach(routed).await; //~ E0308
}

fn splice_without_a_login(leased: Leased<'_>) {
    let _ = Spliced::splice(leased); //~ E0308
}

async fn dial_a_tenant(tenant: &std::sync::Arc<crate::registry::Tenant>) {
    let _ = crate::backend::dial(tenant, std::time::Duration::ZERO).await; //~ E0308
}

async fn dial_before_routing(identified: &Identified<'_>) {
    let _ = crate::backend::dial(identified, std::time::Duration::ZERO).await; //~ E0308
}

async fn dial_an_address() {
    let _ = crate::backend::dial("10.0.0.1:5432", std::time::Duration::ZERO).await; //~ E0308
}

fn route_twice(identified: Identified<'_>) {
    let _ = Routed::route(identified);
    let _ = Routed::route(identified); //~ E0382
}

async fn lease_twice(routed: Routed<'_>) {
    let _ = Leased::lease(routed).await;
    let _ = Leased::lease(routed).await; //~ E0382
}

async fn attach_twice_with_one_lease(leased: Leased<'_>) {
    let _ = Attached::attach(leased).await;
    let _ = Attached::attach(leased).await; //~ E0382
}

fn splice_twice(attached: Attached<'_>) {
    let _ = Spliced::splice(attached);
    let _ = Spliced::splice(attached); //~ E0382
}

async fn log_in_twice_on_one_connection(leased: Leased<'_>) {
    let (_routed, lease, connected) = leased.into_parts();
    let leased::Connected::Dialled(connection) = connected else { return };
    let _ = connection.log_in(lease.credential()).await;
    let _ = connection.log_in(lease.credential()).await; //~ E0382
}

async fn refuse_twice(client: Client, first: Refusal, second: Refusal) {
    refuse(client, first).await;
    refuse(client, second).await; //~ E0382
}

async fn refuse_a_session_that_was_spliced(mut client: Client, refusal: Refusal) {
    let Ok(Admitted::Session(spliced)) = login(&mut client).await else {
        return;
    };
    refuse(client, refusal).await; //~ E0505
    spliced.run().await;
}

fn keep_a_route(routed: &Routed<'_>) -> Routed<'static> {
    routed.clone() //~ E0308
}

fn keep_a_lease(lease: &crate::lease::Lease) -> crate::lease::Lease {
    lease.clone() //~ E0308
}

fn take_another_route(mut routed: Routed<'_>, route: std::sync::Arc<Route>) {
    routed.route = route; //~ E0616
}

fn lead_a_route_elsewhere(mut route: Route, tenant: std::sync::Arc<crate::registry::Tenant>) {
    route.tenant = tenant; //~ E0616
}

fn keep_a_route_to_change_it(route: &Route) -> Route {
    route.clone() //~ E0308
}

async fn take_a_connection_without_a_route(proxy: &'static crate::proxy::Proxy, id: &crate::tenant::TenantId) {
    let _ = proxy.pool.take(id).await; //~ E0308
}

fn take_another_lease(mut leased: Leased<'_>, lease: crate::lease::Lease) {
    leased.lease = lease; //~ E0616
}

fn hold_a_lease_longer(lease: crate::lease::Lease) {
    let _ = lease.0; //~ E0616
}
